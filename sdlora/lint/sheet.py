"""A contact sheet: each image as it is trained on, cropped to its bucket and masked, above its caption."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..config.sections import MaskKind
from ..data.buckets import Placement
from ..data.decoding import ImageError
from ..data.examine import ExaminedImage
from ..data.images import cut_out, open_image, open_mask, scale
from ..data.lettering import Lettering
from ..data.views import salient_crop
from ..errors import DataError
from ..files import write_png
from ..progress import Progress

SIDE = 192
"""In pixels; a larger bucket is reduced to fit, a smaller one is shown pixel by pixel."""
GAP, COLUMNS, ROWS = 8, 8, 20
"""Pixels around an image; images in a row; rows in a sheet, of which a large set has several."""
VEIL = (255, 0, 255)
"""Colour over what does not count in the loss, as opaque as it does not count."""
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
_LINES, _LINE = 4, 15
"""Lines of a caption, and the height of each in pixels."""
_TEXT_WIDTH = 128


def write_sheets(
    examined: Sequence[ExaminedImage],
    placements: Sequence[Placement],
    *,
    background: str,
    mask: MaskKind,
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
        _save(_drawn(some, images), target)
        written.append(target)
    return tuple(written)


def image_as_seen(image: ExaminedImage, placement: Placement, *, background: str, mask: MaskKind) -> Image.Image:
    """The image scaled and cropped for its bucket, with what its mask excludes covered: RGB, at most ``SIDE`` pixels a side.

    Of random crops, the one in the middle is shown.
    """
    source = image.source
    whole = open_image(source.file, background)
    if source.crop == "salient":
        placement = salient_crop(whole, placement)
    seen = _cropped(whole, placement)
    try:
        weights = open_mask(source.file, source.mask, (image.width, image.height), mask)
    except ImageError:  # It is among the findings.
        weights = None
    if weights is not None:
        cover = _cropped(Image.fromarray((weights * 255).round().astype(np.uint8)), placement)
        seen = Image.composite(seen, Image.new("RGB", seen.size, VEIL), cover)
    seen.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return seen


def _cropped(image: Image.Image, placement: Placement) -> Image.Image:
    return Image.fromarray(cut_out(scale(image, placement), placement))


def _drawn(shown: Sequence[tuple[ExaminedImage, Placement]], images: Sequence[Image.Image]) -> Image.Image:
    letters = Lettering(12)
    columns = min(COLUMNS, len(images))
    wide = max(_TEXT_WIDTH, *(image.width for image in images))
    high = max(image.height for image in images)
    cell = (wide + GAP, high + (_LINES + 1) * _LINE + 2 * GAP)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, ((examined, placement), image) in enumerate(zip(shown, images, strict=True)):
        left, top = GAP + number % columns * cell[0], GAP + number // columns * cell[1]
        sheet.paste(image, (left, top))
        size = f" {placement.width}x{placement.height}"
        name = letters.fitted(examined.source.name, wide - letters.length(size)) + size
        letters.draw(pen, (left, top + high + 2), name, _FAINT)
        caption = examined.source.rules.plain(examined.source.captions)
        for row, text in enumerate(letters.wrapped(caption, wide, lines=_LINES), 1):
            letters.draw(pen, (left, top + high + 2 + row * _LINE), text, _INK)
    return sheet


def _save(sheet: Image.Image, file: Path) -> None:
    try:
        write_png(file, sheet)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror or error}") from None
