"""A loss curve as an SVG file: the loss of each step as a dot, and their moving mean as a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from .validation_record import ValidationRecord

_WIDTH, _HEIGHT = 960, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 28, 62, 62
"""Margins around the plot in pixels."""
_DRAWN = 3000
"""Steps that are drawn, at most; of more, evenly chosen ones."""
_INK, _FAINT, _GRID, _DOT, _LINE = "#1f2933", "#616e7c", "#e4e7eb", "#7fb3dd", "#0b5394"
_VALIDATION = "#c2410c"
_SHARE, _ROOM = 0.99, 1.15
"""Share of the losses that fit into the plot in any case, and how much higher it may be to hold the rest."""


def window_of(count: int) -> int:
    """Steps that the line averages over, an odd number: 10 % of ``count``, at least 5 and at most 1001."""
    return min(max(5, count // 10), 1000) | 1


def moving_mean(values: Sequence[float]) -> np.ndarray:
    """Mean of the ``window_of`` values around each, (n,) float64; at the ends of fewer, and NaN where there are none.

    The nearest count most: the weights are those of a normal distribution whose deviation is a sixth of the window. NaN
    and Inf are left out.
    """
    losses, window = np.asarray(values, dtype=np.float64), window_of(len(values))
    weights = np.exp(-0.5 * ((np.arange(window) - window // 2) / (window / 6)) ** 2)
    finite = np.isfinite(losses)
    if not finite.any():
        return np.full(len(losses), np.nan)
    middle = slice(window // 2, window // 2 + len(losses))
    sums = np.convolve(np.where(finite, losses, 0.0), weights)[middle]
    counts = np.convolve(finite.astype(np.float64), weights)[middle]
    return np.divide(sums, counts, out=np.full(len(losses), np.nan), where=counts > 0)


def loss_curve(
    title: str, steps: Sequence[int], losses: Sequence[float], validation: Sequence[ValidationRecord] = ()
) -> str:
    """The curve as the text of an SVG file; ``losses`` are those of ``steps``. Steps ascend, in ``validation`` too."""
    means, values = moving_mean(losses), np.asarray(losses, dtype=np.float64)
    measured = [point for point in validation if math.isfinite(point.loss)]
    finite = np.append(values[np.isfinite(values)], [point.loss for point in measured])
    top = _highest(finite)
    last = max([*steps, *(point.step for point in validation), 1])
    x, y = _Axis(0, last, _LEFT, _WIDTH - _RIGHT), _Axis(0.0, top, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="14">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 36, title, size=18, weight="bold"),
        *_axes(x, y),
        *_legend(window_of(len(losses)), validation=bool(measured)),
        *_dots(x, y, steps, values),
        *_line(x, y, steps, means),
        *_measured(x, y, measured),
    ]
    higher = values[np.isfinite(values) & (values > top)]
    above = len(higher)
    if above:
        note = f"▲ {above} {'loss' if above == 1 else 'losses'} above, up to {higher.max():.3g}"
        parts.append(_text(_WIDTH - _RIGHT, _TOP - 8, note, size=12, anchor="end", colour=_FAINT))
    return "\n".join([*parts, "</svg>\n"])


class _Axis:
    """From values between ``low`` and ``high`` to pixels between ``start`` and ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int, *, whole: bool = False) -> list[float]:
        """Round values, apart by 1, 2 or 5 times a power of ten."""
        apart = (self.high - self.low) / about
        unit = 10.0 ** math.floor(math.log10(apart))
        apart = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= apart * 0.999)
        apart = max(1.0, apart) if whole else apart
        return [number * apart for number in range(math.floor(self.high / apart * 1.0000001) + 1)]


def _highest(finite: np.ndarray) -> float:
    """Upper end of the axis: above every loss, unless a few are far above the others."""
    if not finite.size or finite.max() <= 0:
        return 1.0
    usual = float(np.quantile(finite, _SHARE)) * _ROOM
    highest = float(finite.max()) * 1.04
    return min(highest, usual) if usual > 0 else highest


def _axes(x: _Axis, y: _Axis) -> list[str]:
    parts = []
    values = y.ticks(6)
    digits = max(0, -math.floor(math.log10(values[1]) + 1e-9)) if len(values) > 1 else 0
    for value in values:
        height = y.at(value)
        parts.append(f'<path d="M{x.start} {height:.1f}H{x.end}" stroke="{_GRID}"/>')
        parts.append(_text(x.start - 10, height + 5, f"{value:.{digits}f}", anchor="end", colour=_FAINT))
    for value in x.ticks(8, whole=True):
        place = x.at(value)
        parts.append(f'<path d="M{place:.1f} {y.start}v6" stroke="{_FAINT}"/>')
        parts.append(_text(place, y.start + 24, f"{value:.0f}", anchor="middle", colour=_FAINT))
    parts.append(f'<path d="M{x.start} {y.end}V{y.start}H{x.end}" fill="none" stroke="{_FAINT}"/>')
    middle = (y.start + y.end) / 2
    parts.append(_text((x.start + x.end) / 2, y.start + 50, "step", anchor="middle"))
    return [*parts, f'<g transform="rotate(-90 26 {middle})">{_text(26, middle, "loss", anchor="middle")}</g>']


def _legend(window: int, *, validation: bool) -> list[str]:
    right = _WIDTH - _RIGHT
    shown = [
        f'<path d="M{right - 404} 31h26" stroke="{_VALIDATION}" stroke-width="2"/>',
        _text(right - 370, 36, "validation"),
    ]
    return [
        *(shown if validation else ()),
        f'<circle cx="{right - 272}" cy="31" r="3" fill="{_DOT}"/>',
        _text(right - 262, 36, "each step"),
        f'<path d="M{right - 178} 31h26" stroke="{_LINE}" stroke-width="2.5"/>',
        _text(right - 144, 36, f"mean over {window} steps"),
    ]


def _dots(x: _Axis, y: _Axis, steps: Sequence[int], values: np.ndarray) -> list[str]:
    chosen = [place for place in _drawn(steps) if np.isfinite(values[place])]
    within = [place for place in chosen if values[place] <= y.high]
    # A line of no length with round ends is a dot: one path holds them all.
    dots = "".join(f"M{x.at(steps[place]):.1f} {y.at(values[place]):.1f}h0" for place in within)
    above = [place for place in range(len(steps)) if np.isfinite(values[place]) and values[place] > y.high]
    tips = "".join(f"M{x.at(steps[place]) - 4:.1f} {y.end + 8:.1f}l4 -7l4 7z" for place in above)
    return [
        f'<path d="{dots}" stroke="{_DOT}" stroke-width="4" stroke-linecap="round" stroke-opacity="0.55"/>',
        f'<path d="{tips}" fill="{_DOT}"/>',
    ]


def _line(x: _Axis, y: _Axis, steps: Sequence[int], means: np.ndarray) -> list[str]:
    known = [(steps[place], min(means[place], y.high)) for place in _drawn(steps) if np.isfinite(means[place])]
    points = " ".join(f"{x.at(step):.1f},{y.at(mean):.1f}" for step, mean in known)
    return [f'<polyline points="{points}" fill="none" stroke="{_LINE}" stroke-width="2.5" stroke-linejoin="round"/>']


def _measured(x: _Axis, y: _Axis, points: Sequence[ValidationRecord]) -> list[str]:
    """The validation losses as points on a line, each with its interval as a bar, as far as it is within the plot."""
    if not points:
        return []
    places = [(x.at(point.step), y.at(min(point.loss, y.high)), point) for point in points]
    line = " ".join(f"{across:.1f},{up:.1f}" for across, up, _ in places)
    marks = "".join(f"M{across:.1f} {up:.1f}h0" for across, up, _ in places)
    bars = "".join(
        f"M{across:.1f} {y.at(max(0.0, point.loss - point.interval)):.1f}"
        f"V{y.at(min(y.high, point.loss + point.interval)):.1f}"
        for across, _, point in places
        if point.interval is not None and point.loss <= y.high
    )
    return [
        f'<g stroke="{_VALIDATION}" fill="none" stroke-linecap="round"><path d="{bars}" stroke-opacity="0.5"/>'
        f'<path d="M{line.replace(" ", "L")}" stroke-width="2"/><path d="{marks}" stroke-width="7"/></g>'
    ]


def _drawn(steps: Sequence[int]) -> range:
    return range(0, len(steps), max(1, -(-len(steps) // _DRAWN)))


def _text(
    x: float, y: float, text: str, *, size: int = 14, anchor: str = "start", colour: str = _INK, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )
