"""Images side by side, with labels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _GAP = (40, 40, 40), (255, 255, 255), 6


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], *, columns: Sequence[str], row_labels: Sequence[str] = (), scale: int = 1
) -> Image.Image:
    """A grid of ``rows``, all of the same length and of images of equal size.

    ``columns`` are the labels above, ``row_labels`` those on the left. Each image is enlarged ``scale`` times without
    smoothing.
    """
    width, height = rows[0][0].width * scale, rows[0][0].height * scale
    font = ImageFont.load_default(max(11, height // 12))
    line = round(font.getbbox("Ag")[3]) + _GAP
    left = max((int(font.getlength(label)) + 2 * _GAP for label in row_labels), default=0)
    size = (left + len(columns) * (width + _GAP) - _GAP, line + len(rows) * (height + _GAP) - _GAP)
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    for x, label in enumerate(columns):
        middle = left + x * (width + _GAP) + width / 2
        pen.text((middle, line / 2), label, _INK, font, anchor="mm")
    for y, row in enumerate(rows):
        top = line + y * (height + _GAP)
        if y < len(row_labels):
            pen.text((_GAP, top + height / 2), row_labels[y], _INK, font, anchor="lm")
        for x, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + x * (width + _GAP), top))
    return canvas
