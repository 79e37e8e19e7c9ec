"""Images side by side, with labels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..data.lettering import Lettering

LABEL_LINES = 4
"""A label above an image has at most as many lines; the rest of it is cut."""
_INK, _PAPER, _GAP = (40, 40, 40), (255, 255, 255), 6


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], *, columns: Sequence[str], row_labels: Sequence[str] = (), scale: int = 1
) -> Image.Image:
    """A grid of ``rows``, all of the same length and of images of equal size.

    ``columns`` are the labels above, ``row_labels`` those on the left, all wrapped to the images' width. Each image is
    enlarged ``scale`` times without smoothing. The images are at the bottom right, 6 pixels apart.
    """
    width, height = rows[0][0].width * scale, rows[0][0].height * scale
    letters = Lettering(max(11, height // 12))
    line = letters.height + _GAP
    beside = [letters.wrapped(label, width, lines=LABEL_LINES) for label in row_labels]
    left = max((int(letters.length(text)) + 2 * _GAP for label in beside for text in label), default=0)
    labels = [letters.wrapped(label, width, lines=LABEL_LINES) for label in columns]
    above = line * max((len(label) for label in labels), default=1) or line
    size = (left + len(columns) * (width + _GAP) - _GAP, above + len(rows) * (height + _GAP) - _GAP)
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    for x, label in enumerate(labels):
        middle, top = left + x * (width + _GAP) + width / 2, above - line * len(label)
        for number, text in enumerate(label):
            letters.draw(pen, (middle - letters.length(text) / 2, top + number * line + _GAP / 2), text, _INK)
    for y, row in enumerate(rows):
        top = above + y * (height + _GAP)
        label = beside[y] if y < len(beside) else []
        first = top + (height - letters.height - line * (len(label) - 1)) / 2
        for number, text in enumerate(label):
            letters.draw(pen, (_GAP, first + number * line), text, _INK)
        for x, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + x * (width + _GAP), top))
    return canvas
