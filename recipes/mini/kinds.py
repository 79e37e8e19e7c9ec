"""Kinds of art that the autoencoder learns from or is measured on: drawn, printed, woven, photographed.

Each kind is a function of a random generator and the ``Sources``, and returns uint8 (RASTER, RASTER, 3). ``LEARNED`` are
trained on; no image of a kind in ``HELD_OUT`` is, so that the measure says how styles fare that nobody has foreseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .art import BACKGROUNDS, RASTER

FONT = Path(__file__).parents[2] / "sdlora" / "data" / "letters-western.ttf"
LETTERS = "ABCDEFGHKLMNOPRSTUVWXYZabcdefghiklmnopqrstuvwxyz0123456789&?!"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """What the kinds are made of: RGBA drawings, uint8 (h, w, 4), and photographs, uint8 (h, w, 3)."""

    emoji: Sequence[np.ndarray]
    icons: Sequence[np.ndarray]
    photographs: Sequence[np.ndarray]


Kind = Callable[[np.random.Generator, Sources], np.ndarray]


def random_colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(c) for c in rng.integers(0, 256, 3))


def ground(rng: np.random.Generator) -> tuple[int, ...]:
    """One of the base's backgrounds half of the time, else white, black or any colour."""
    chance = rng.random()
    if chance < 0.5:
        return list(BACKGROUNDS.values())[int(rng.integers(len(BACKGROUNDS)))]
    return ((255, 255, 255), (0, 0, 0), random_colour(rng))[int(rng.integers(3))]


def two_colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper that differ in brightness, either the darker."""
    while True:
        one, other = random_colour(rng), ground(rng)
        if abs(sum(one) - sum(other)) > 200:
            return one, other


def sheet(rng: np.random.Generator) -> Image.Image:
    return Image.new("RGB", (RASTER, RASTER), ground(rng))


def smooth_field(rng: np.random.Generator, cells: int) -> np.ndarray:
    """(RASTER, RASTER) float32 in [0, 1], smooth, with about ``cells`` hills along a side."""
    coarse = Image.fromarray(rng.random((cells + 2, cells + 2)).astype(np.float32))
    field = np.asarray(coarse.resize((RASTER, RASTER), Image.Resampling.BICUBIC))
    return (field - field.min()) / max(float(np.ptp(field)), 1e-6)


def mixed(amount: np.ndarray, ink: Sequence[int], paper: Sequence[int]) -> np.ndarray:
    """``amount`` (h, w) of ink in [0, 1] on paper."""
    share = np.clip(amount, 0, 1)[..., None]
    return (share * np.array(ink) + (1 - share) * np.array(paper)).round().astype(np.uint8)


def placed(drawing: np.ndarray, canvas: Image.Image, rng: np.random.Generator, side: int) -> None:
    art = Image.fromarray(drawing).resize((side, side), Image.Resampling.LANCZOS)
    reach = RASTER - side
    corner = tuple(int(v) for v in rng.integers(min(0, reach), max(1, reach + 1), 2))
    canvas.paste(art, corner, art)


def emoji(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    canvas = sheet(rng)
    placed(sources.emoji[int(rng.integers(len(sources.emoji)))], canvas, rng, int(rng.integers(96, 168)))
    return np.asarray(canvas)


def crowd(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Several small drawings over shapes or a gradient."""
    canvas = Image.fromarray(gradient(rng, sources)) if rng.random() < 0.5 else Image.fromarray(shapes(rng, sources))
    for _ in range(int(rng.integers(2, 6))):
        pool = sources.emoji if rng.random() < 0.7 else sources.icons
        placed(pool[int(rng.integers(len(pool)))], canvas, rng, int(rng.integers(32, 100)))
    return np.asarray(canvas)


def icon(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """An icon of the other sets; those in black take any ink."""
    drawing = sources.icons[int(rng.integers(len(sources.icons)))]
    ink, paper = two_colours(rng)
    canvas = Image.new("RGB", (RASTER, RASTER), paper)
    if drawing[..., :3].max() == 0:
        drawing = np.concatenate(
            [np.broadcast_to(np.array(ink, np.uint8), drawing[..., :3].shape), drawing[..., 3:]], -1
        )
    placed(drawing, canvas, rng, int(rng.integers(72, 168)))
    return np.asarray(canvas)


def shapes(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Rectangles, ellipses and strokes in any colour."""
    canvas = sheet(rng)
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(3, 30))):
        (x0, x1), (y0, y1) = np.sort(rng.integers(-8, RASTER + 8, 2)), np.sort(rng.integers(-8, RASTER + 8, 2))
        x1, y1 = min(x1, x0 + 80), min(y1, y0 + 80)
        colour, form = random_colour(rng), rng.integers(3)
        if form == 0:
            pen.rectangle((x0, y0, x1, y1), fill=colour)
        elif form == 1:
            pen.ellipse((x0, y0, x1 + 1, y1 + 1), outline=colour, width=int(rng.integers(1, 4)))
        else:
            pen.line((x0, y0, x1, int(rng.integers(0, RASTER))), fill=colour, width=int(rng.integers(1, 5)))
    return np.asarray(canvas)


def strokes(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Curved lines of one ink, smoothly drawn at four times the size; each image has its own width."""
    ink, paper = two_colours(rng)
    canvas = Image.new("RGB", (4 * RASTER, 4 * RASTER), paper)
    pen, width = ImageDraw.Draw(canvas), float(rng.uniform(0.8, 4))
    for _ in range(int(rng.integers(4, 26))):
        points = rng.uniform(-0.1, 1.1, (4, 2)) * 4 * RASTER
        t = np.linspace(0, 1, 40)[:, None]
        curve = (1 - t) ** 3 * points[0] + 3 * t * (1 - t) ** 2 * points[1]
        curve = curve + 3 * t**2 * (1 - t) * points[2] + t**3 * points[3]
        colour = ink if rng.random() < 0.8 else random_colour(rng)
        pen.line([tuple(p) for p in curve], fill=colour, width=max(2, round(4 * width)), joint="curve")
    return np.asarray(canvas.resize((RASTER, RASTER), Image.Resampling.BOX))


def waves(rng: np.random.Generator, period: float, angle: float) -> np.ndarray:
    """Distance from the middle of the nearest of parallel lines, over the period: (RASTER, RASTER) in [0, 0.5]."""
    y, x = np.mgrid[0:RASTER, 0:RASTER]
    across = x * math.cos(angle) + y * math.sin(angle) + rng.uniform(0, period)
    return np.abs((across / period) % 1 - 0.5)


def drawing_tone(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Darkness of a drawing, a photograph or a smooth field, (RASTER, RASTER) in [0, 1]."""
    chance = rng.random()
    if chance < 0.5:
        return 1 - emoji(rng, sources).mean(-1) / 255
    if chance < 0.7:
        return 1 - photograph(rng, sources).mean(-1) / 255
    return smooth_field(rng, int(rng.integers(1, 6)))


def hatching(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Parallel lines whose width follows the tone; a second and third direction where it is dark."""
    tone, (ink, paper) = drawing_tone(rng, sources), two_colours(rng)
    period, angle = rng.uniform(3.5, 9), rng.uniform(0, math.pi)
    amount = np.zeros_like(tone)
    for layer in range(int(rng.integers(1, 4))):
        part = np.clip(tone * 1.6 - 0.35 * layer, 0, 0.8)
        lines = (part / 2 - waves(rng, period, angle + layer * rng.uniform(0.7, 1.2))) * period + 0.5
        amount = np.maximum(amount, np.where(part > 0.08, np.clip(lines, 0, 1), 0))
    return mixed(amount, ink, paper)


def halftone(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """A screen of round dots of any angle, whose size follows the tone."""
    tone, (ink, paper) = drawing_tone(rng, sources), two_colours(rng)
    period, angle = rng.uniform(4, 11), rng.uniform(0, math.pi / 2)
    radius = np.hypot(waves(rng, period, angle), waves(rng, period, angle + math.pi / 2)) * period
    return mixed(np.sqrt(tone) * period * 0.62 - radius + 0.5, ink, paper)


def pixel_grid(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """A drawing in few colours on a coarse grid, sometimes with gaps between the cells."""
    cells = int(rng.choice([16, 20, 24, 32, 40]))
    small = Image.fromarray(crowd(rng, sources) if rng.random() < 0.2 else emoji(rng, sources))
    small = small.resize((cells, cells), Image.Resampling.BOX)
    if rng.random() < 0.7:
        small = small.quantize(int(rng.integers(4, 17)), dither=Image.Dither.NONE).convert("RGB")
    pixels = np.array(small.resize((RASTER, RASTER), Image.Resampling.NEAREST))
    if rng.random() < 0.3 and RASTER % cells == 0:
        colour = random_colour(rng)
        pixels[:: RASTER // cells] = colour
        pixels[:, :: RASTER // cells] = colour
    return pixels


def checks(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Checks, stripes, plaid or bricks, turned by any angle."""
    (ink, paper), period = two_colours(rng), rng.uniform(4, 24)
    angle = rng.choice([0, math.pi / 4, rng.uniform(0, math.pi)])
    one, other = waves(rng, period, angle), waves(rng, period * rng.choice([1, 2]), angle + math.pi / 2)
    soft = period * 2
    first, second = (np.clip((w - rng.uniform(0.1, 0.4)) * soft + 0.5, 0, 1) for w in (one, other))
    form = rng.integers(4)
    amount = (first, first * second, (first + second) / 2, np.abs(first - second))[int(form)]
    return mixed(amount, ink, paper)


def dither(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Two colours at the size of 1 to 3 pixels, by Floyd-Steinberg or by an ordered matrix."""
    tone, (ink, paper) = drawing_tone(rng, sources), two_colours(rng)
    step = int(rng.integers(1, 4))
    side = RASTER // step
    small = Image.fromarray((255 * (1 - tone)).astype(np.uint8)).resize((side, side), Image.Resampling.BOX)
    if rng.random() < 0.5:
        dots = 1 - np.asarray(small.convert("1"), np.float32)
    else:
        matrix = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16
        dots = (np.asarray(small) / 255 < np.tile(matrix, (side // 4 + 1, side // 4 + 1))[:side, :side]).astype(
            np.float32
        )
    large = Image.fromarray(dots).resize((RASTER, RASTER), Image.Resampling.NEAREST)
    return mixed(np.asarray(large), ink, paper)


def lettering(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    ink, paper = two_colours(rng)
    canvas = Image.new("RGB", (RASTER, RASTER), paper)
    pen, height = ImageDraw.Draw(canvas), int(rng.integers(9, 60))
    font = ImageFont.truetype(str(FONT), height)
    for line in range(1 + RASTER // (height + 4)):
        word = "".join(LETTERS[int(n)] for n in rng.integers(0, len(LETTERS), int(rng.integers(1, 12))))
        pen.text((int(rng.integers(-4, 40)), line * (height + 4)), word, fill=ink, font=font)
    return np.asarray(canvas.rotate(float(rng.normal(0, 8)), Image.Resampling.BICUBIC, fillcolor=paper))


def gradient(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Two to four colours that melt into each other."""
    colours = np.array([random_colour(rng) for _ in range(4)])
    one, other = smooth_field(rng, int(rng.integers(1, 3))), smooth_field(rng, int(rng.integers(1, 4)))
    top = one[..., None] * colours[0] + (1 - one[..., None]) * colours[1]
    low = one[..., None] * colours[2] + (1 - one[..., None]) * colours[3]
    return (other[..., None] * top + (1 - other[..., None]) * low).astype(np.uint8)


def texture(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Noise of many sizes in one or three channels: paper, stone, cloud, watercolour."""
    ink, paper = two_colours(rng)
    layers = [2 ** (n / 2) for n in range(2, 13)]
    decline = rng.uniform(0.3, 1.2)
    field = sum(smooth_field(rng, round(cells)) * cells**-decline for cells in layers)
    field = (field - field.min()) / np.ptp(field)
    if rng.random() < 0.4:
        field = np.clip((field - 0.5) * rng.uniform(2, 8) + 0.5, 0, 1)
    return mixed(field, ink, paper)


def outlines(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """The edges of a drawing as lines of one ink, thin or thick."""
    ink, paper = two_colours(rng)
    edges = Image.fromarray(emoji(rng, sources)).convert("L").filter(ImageFilter.FIND_EDGES)
    amount = np.asarray(edges.filter(ImageFilter.MaxFilter(int(rng.choice([1, 3, 3, 5])))), np.float32) / 255
    amount[:2] = amount[-2:] = 0
    amount[:, :2] = amount[:, -2:] = 0
    return mixed(np.clip(amount * rng.uniform(1.5, 5), 0, 1), ink, paper)


def posterised(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """A drawing or photograph in a few flat tones between two colours, as in a screen print."""
    tone, (ink, paper) = drawing_tone(rng, sources), two_colours(rng)
    levels = int(rng.integers(1, 5))
    return mixed(np.round(tone * levels) / levels, ink, paper)


def watercolour(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """A soft drawing with wobbling edges on textured paper."""
    drawing = Image.fromarray(emoji(rng, sources)).filter(ImageFilter.MedianFilter(int(rng.choice([3, 5, 7]))))
    wobble = [np.rint((smooth_field(rng, 24) - 0.5) * rng.uniform(2, 9)).astype(int) for _ in range(2)]
    y, x = np.mgrid[0:RASTER, 0:RASTER]
    moved = np.asarray(drawing)[np.clip(y + wobble[0], 0, RASTER - 1), np.clip(x + wobble[1], 0, RASTER - 1)]
    grain = 1 + rng.uniform(0.05, 0.3) * (smooth_field(rng, 60) - 0.5)[..., None]
    return np.clip(moved * grain, 0, 255).astype(np.uint8)


def photograph(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """A square of a photograph, at a quarter to all of its size."""
    pixels = sources.photographs[int(rng.integers(len(sources.photographs)))]
    side = (
        int(rng.integers(RASTER, min(pixels.shape[:2]) + 1))
        if min(pixels.shape[:2]) > RASTER
        else min(pixels.shape[:2])
    )
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in pixels.shape[:2])
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(square.resize((RASTER, RASTER), Image.Resampling.LANCZOS))


def stippling(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """A tone as scattered dots of one size."""
    tone, (ink, paper) = drawing_tone(rng, sources), two_colours(rng)
    canvas = Image.new("RGB", (4 * RASTER, 4 * RASTER), paper)
    pen, radius = ImageDraw.Draw(canvas), float(rng.uniform(3, 6))
    for x, y, chance in rng.random((2200, 3)):
        if chance < tone[int(y * RASTER), int(x * RASTER)]:
            pen.circle((4 * RASTER * x, 4 * RASTER * y), radius, fill=ink)
    return np.asarray(canvas.resize((RASTER, RASTER), Image.Resampling.BOX))


def contour_lines(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Lines of equal height, as on a map."""
    (ink, paper), field = two_colours(rng), smooth_field(rng, int(rng.integers(2, 5)))
    height = field * rng.uniform(6, 12)
    down, across = np.gradient(height)
    distance = np.abs((height % 1) - 0.5) / np.maximum(np.hypot(down, across), 1e-3)
    return mixed(rng.uniform(0.8, 1.6) - distance, ink, paper)


def stained_glass(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Cells of colour with dark bars between them."""
    points = rng.uniform(0, RASTER, (int(rng.integers(12, 40)), 2))
    y, x = np.mgrid[0:RASTER, 0:RASTER]
    distances = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
    nearest = np.sort(distances, -1)
    colours = rng.integers(40, 256, (len(points), 3))
    bar = np.clip(rng.uniform(1.5, 3.5) - (nearest[..., 1] - nearest[..., 0]), 0, 1)[..., None]
    return (colours[distances.argmin(-1)] * (1 - bar) + 20 * bar).astype(np.uint8)


def guilloche(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """The interwoven curves of banknotes."""
    ink, paper = two_colours(rng)
    canvas = Image.new("RGB", (4 * RASTER, 4 * RASTER), paper)
    pen, t = ImageDraw.Draw(canvas), np.linspace(0, 2 * math.pi, 2400)
    inner, lobes = rng.uniform(0.1, 0.35), int(rng.integers(7, 23))
    for turn in range(int(rng.integers(2, 5))):
        radius = 0.46 * (1 - inner + inner * np.cos(lobes * t + turn * 2 * math.pi / 5))
        points = 4 * RASTER * (0.5 + radius[:, None] * np.stack([np.cos(t), np.sin(t)], -1))
        pen.line([tuple(p) for p in points], fill=ink, width=int(rng.integers(3, 6)), joint="curve")
    return np.asarray(canvas.resize((RASTER, RASTER), Image.Resampling.BOX))


LEARNED: Mapping[Kind, float] = {
    emoji: 8, crowd: 2, icon: 3, shapes: 1.5, strokes: 3, hatching: 3, halftone: 2.5, pixel_grid: 2.5, checks: 1.5,
    dither: 1.5, lettering: 2, gradient: 0.5, texture: 1.5, outlines: 2.5, posterised: 1, watercolour: 1, photograph: 3,
}  # fmt: skip
"""Kind -> its share of the training images, relative to the others."""

HELD_OUT: tuple[Kind, ...] = (stippling, contour_lines, stained_glass, guilloche, photograph, icon, emoji)
"""Measured on sources that are held out as well: other photographs, OpenMoji as icons, Streamline as emoji."""


def learned(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """An image of a random kind, uint8 (RASTER, RASTER, 3)."""
    shares = np.array(list(LEARNED.values()))
    kind = list(LEARNED)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    return kind(rng, sources)
