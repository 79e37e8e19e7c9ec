"""A contact sheet: each image as it is trained on, cropped to its bucket and masked, above its caption."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.buckets import Placement
from ..data.decoding import ImageError
from ..data.images import cut_out, open_image, open_mask, scale
from ..data.views import salient_crop
from ..errors import DataError
from ..progress import Progress
from .image_checks import Examined

SIDE = 192
"""Pixels; a larger bucket is made smaller to fit, a smaller one is shown pixel by pixel."""
GAP, COLUMNS, ROWS = 8, 8, 20
"""Pixels around an image; images in a row; rows in a sheet, of which a large set has several."""
VEIL = (255, 0, 255)
"""What does not count in the loss is covered with, as far as it does not count."""
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
_LINES, _LINE = 4, 15
"""Of a caption, and how many pixels high each is."""
_TEXT_WIDTH = 128


def write_sheets(
    examined: Sequence[Examined],
    placements: Sequence[Placement],
    *,
    background: str,
    mask: Literal["none", "alpha", "files"],
    file: Path,
    progress: Progress,
) -> tuple[Path, ...]:
    """Write ``file`` as PNG, and ``NAME-2.png`` and so on where there are more images than fit one sheet.

    Raises:
        DataError: there is no image to show, or the file cannot be written; nothing half-written is left then.
    """
    if not examined:
        raise DataError(f"{file}: no image can be shown")
    shown = list(zip(examined, placements, strict=True))
    progress.start("Drawing the contact sheet", len(shown))
    written = []
    for number, start in enumerate(range(0, len(shown), COLUMNS * ROWS), 1):
        some = shown[start : start + COLUMNS * ROWS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = list(pool.map(lambda entry: image_as_seen(*entry, background=background, mask=mask), some))
        progress.advance(len(some))
        target = file if number == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        _save(_drawn([own for own, _ in some], [place for _, place in some], images), target)
        written.append(target)
    return tuple(written)


def image_as_seen(
    own: Examined, placement: Placement, *, background: str, mask: Literal["none", "alpha", "files"]
) -> Image.Image:
    """The image scaled and cropped for its bucket, what its mask leaves out covered; at most ``SIDE`` pixels a side.

    Of crops that are drawn anew each time, the one in the middle.
    """
    image = open_image(own.source.file, background)
    if own.source.crop == "salient":
        placement = salient_crop(image, placement)
    image = _cropped(image, placement)
    try:
        weights = open_mask(own.source.file, own.source.mask, (own.facts.width, own.facts.height), mask)
    except ImageError:  # It is among the findings.
        weights = None
    if weights is not None:
        cover = _cropped(Image.fromarray((weights * 255).round().astype(np.uint8)), placement)
        image = Image.composite(image, Image.new("RGB", image.size, VEIL), cover)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def _cropped(image: Image.Image, placement: Placement) -> Image.Image:
    return Image.fromarray(cut_out(scale(image, placement), placement))


def _drawn(examined: Sequence[Examined], placements: Sequence[Placement], images: Sequence[Image.Image]) -> Image.Image:
    font = ImageFont.load_default(12)
    columns = min(COLUMNS, len(images))
    wide = max(_TEXT_WIDTH, *(image.width for image in images))
    high = max(image.height for image in images)
    cell = (wide + GAP, high + (_LINES + 1) * _LINE + 2 * GAP)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (own, placement, image) in enumerate(zip(examined, placements, images, strict=True)):
        left, top = GAP + number % columns * cell[0], GAP + number // columns * cell[1]
        sheet.paste(image, (left, top))
        size = f" {placement.width}x{placement.height}"
        name = _fitted(own.source.name, font, wide - font.getlength(size)) + size
        pen.text((left, top + high + 2), name, _FAINT, font)
        caption = own.source.rules.plain(own.source.captions)
        for row, text in enumerate(_wrapped(caption, font, wide), 1):
            pen.text((left, top + high + 2 + row * _LINE), text, _INK, font)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Iterator[str]:
    """At most ``_LINES`` lines of at most ``width`` pixels; a word that is wider is cut."""
    words = text.split()
    for row in range(_LINES):
        if not words:
            return
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        if row == _LINES - 1:
            count = len(words)
        yield _fitted(" ".join(words[:count]), font, width)
        words = words[count:]


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    text = text[:200]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _save(sheet: Image.Image, file: Path) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(part, format="PNG")
        part.replace(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink()
