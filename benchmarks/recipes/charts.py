"""Lines in a chart, as an image: enough for notebooks, without a library for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from sdlora.data.lettering import Lettering

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 190, 44, 52
INK, FAINT, GRID = (31, 41, 51), (97, 110, 124), (228, 231, 235)
COLOURS = ((11, 83, 148), (56, 142, 60), (230, 126, 34), (192, 57, 43), (125, 60, 152), (40, 40, 40), (0, 150, 160))


def line_chart(
    title: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, across: str, logarithmic: bool = False
) -> Image.Image:
    """Each of ``lines`` through its points (x, y); ``across`` says what x is, which may be drawn by its logarithm."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low, high = min(ys), max(ys)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room

    def place(x: float, y: float) -> tuple[float, float]:
        scaled, first, last = (math.log(v) if logarithmic else v for v in (x, min(xs), max(xs)))
        share = (scaled - first) / ((last - first) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT), TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    canvas, letters = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255)), Lettering(14)
    pen = ImageDraw.Draw(canvas)
    letters.draw(pen, (LEFT, 12), title, INK)
    for value in _round_values(low, high):
        _, height = place(xs[0], value)
        pen.line((LEFT, height, WIDTH - RIGHT, height), fill=GRID)
        label = f"{value:.4g}"
        letters.draw(pen, (LEFT - 8 - letters.length(label), height - letters.height / 2), label, FAINT)
    for value in sorted(set(xs)):
        left, _ = place(value, low)
        label = f"{value:g}"
        letters.draw(pen, (left - letters.length(label) / 2, HEIGHT - BOTTOM + 6), label, FAINT)
    middle = (LEFT + WIDTH - RIGHT - letters.length(across)) / 2
    letters.draw(pen, (middle, HEIGHT - letters.height - 6), across, INK)
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(x, y) for x, y in points]
        pen.line(places, fill=colour, width=3, joint="curve")
        for x, y in places:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        height = TOP + number * (letters.height + 8)
        pen.line((WIDTH - RIGHT + 14, height + 9, WIDTH - RIGHT + 38, height + 9), fill=colour, width=3)
        letters.draw(pen, (WIDTH - RIGHT + 46, height), name, INK)
    return canvas


def _round_values(low: float, high: float) -> list[float]:
    """Between ``low`` and ``high``, apart by 1, 2 or 5 times a power of ten."""
    apart = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(apart))
    apart = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= apart)
    return [number * apart for number in range(math.ceil(low / apart), math.floor(high / apart) + 1)]
