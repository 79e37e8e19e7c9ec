"""The labelled image of a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from ..data.lettering import Lettering
from ..generation.grid import labelled_grid
from .axes import Axis

_PAPER, _INK, _GAP = (255, 255, 255), (40, 40, 40), 12
MOST_PIXELS = 300_000_000
"""The largest labelled image; many programs show no larger ones. Its cells are files of their own."""


def labelled_sheet(
    images: Mapping[tuple[int, int, int], Image.Image], axes: Sequence[Axis], *, scale: int
) -> Image.Image:
    """Columns for x, rows for y; for each value of z such a grid under its label, one below the other.

    Smaller images are in the middle of a cell that has room for the largest. Each is enlarged ``scale`` times.
    """
    labels = {axis.direction: axis.labels for axis in axes}
    width, height = (max(sides) for sides in zip(*(image.size for image in images.values()), strict=True))
    columns, rows, sheets = (labels.get(direction, ("",)) for direction in ("x", "y", "z"))
    grids = [
        labelled_grid(
            [[_padded(images[x, y, z], width, height) for x in range(len(columns))] for y in range(len(rows))],
            columns=columns,
            row_labels=rows if "y" in labels else (),
            scale=scale,
        )
        for z in range(len(sheets))
    ]
    return grids[0] if "z" not in labels else _stacked(grids, sheets)


def _padded(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    canvas = Image.new("RGB", (width, height), _PAPER)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _stacked(grids: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Grids of one size below each other, each under its label."""
    width, height = grids[0].size
    letters = Lettering(max(14, width // 40))
    above = letters.height + 2 * _GAP
    canvas = Image.new("RGB", (width, len(grids) * (above + height)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, (grid, label) in enumerate(zip(grids, labels, strict=True)):
        top = number * (above + height)
        letters.draw(pen, (_GAP, top + _GAP), letters.fitted(label, width - 2 * _GAP), _INK)
        canvas.paste(grid, (0, top + above))
    return canvas
