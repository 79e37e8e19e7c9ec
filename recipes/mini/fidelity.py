"""Does an image show what the prompt asked for? Judged by its nearest real image in a simple feature space.

Features: the content's bounding box (all that differs from the border's colour) is scaled to 64 px square. Histograms of
gradient orientation in 8 x 8 cells (Dalal & Triggs 2005, 9 unsigned bins) describe the shape, and an 8 x 8 thumbnail
minus the border's colour describes the colours. Both are scaled to length 1 and have equal weight; similarity is the
inner product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIDE, CELLS, BINS = 64, 8, 9


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """Real images: ``features`` is (n, d) float32, ``concepts`` says what each of them shows."""

    features: np.ndarray
    concepts: tuple[str, ...]
    colour: bool

    @classmethod
    def of(cls, images: Sequence[Image.Image], concepts: Sequence[str], *, colour: bool = True) -> Gallery:
        """Features of each image, unchanged and mirrored; without ``colour``, only shapes are compared."""
        both = [view for image in images for view in (image, ImageOps.mirror(image))]
        return cls(
            features=np.stack([features(view, colour=colour) for view in both]),
            colour=colour,
            concepts=tuple(concept for concept in concepts for _ in range(2)),
        )

    def nearest(self, image: Image.Image) -> str:
        """The concept of the real image nearest to ``image``."""
        return self.concepts[int((self.features @ features(image, colour=self.colour)).argmax())]

    def fidelity(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> float:
        """Share of ``images`` whose nearest real image shows the requested concept, in [0, 1]."""
        hits = [self.nearest(image) == concept for image, concept in zip(images, concepts, strict=True)]
        return float(np.mean(hits))

    @property
    def chance(self) -> float:
        return 1 / len(set(self.concepts))


def features(image: Image.Image, *, colour: bool = True) -> np.ndarray:
    """(CELLS² · (BINS + 3),) float32 of length √2, or the first CELLS² · BINS of it."""
    image = image.convert("RGB")
    (left, top, side), ground = _content(np.asarray(image, np.float32))
    content = Image.new("RGB", (side, side), tuple(int(c) for c in ground))
    content.paste(image, (-left, -top))
    content = content.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(content, np.float32) - ground
    parts = [_orientations(pixels)]
    if colour:
        parts.append(pixels.reshape(CELLS, SIDE // CELLS, CELLS, SIDE // CELLS, 3).mean((1, 3)))
    return np.concatenate([_unit(part.ravel()) for part in parts]).astype(np.float32)


def _content(pixels: np.ndarray) -> tuple[tuple[int, int, int], np.ndarray]:
    """(left, top, side) of the square around the content, which may extend beyond the edge, and the border's colour."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(border, 0)
    differs = np.abs(pixels - ground).max(-1) > 48
    rows, columns = np.flatnonzero(differs.mean(1) > 0.01), np.flatnonzero(differs.mean(0) > 0.01)
    if not len(rows) or not len(columns):
        return (0, 0, pixels.shape[1]), ground
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = int(max(bottom - top, right - left))
    return ((left + right - side) // 2, (top + bottom - side) // 2, side), ground


def _orientations(pixels: np.ndarray) -> np.ndarray:
    across, down = np.gradient(pixels, axis=1), np.gradient(pixels, axis=0)
    strongest = (across**2 + down**2).argmax(-1)[..., None]
    across, down = (np.take_along_axis(g, strongest, -1)[..., 0] for g in (across, down))
    strength, angle = np.hypot(across, down), np.arctan2(down, across) % np.pi / np.pi * BINS
    lower, share = angle.astype(int), angle % 1
    cells = np.arange(SIDE) // (SIDE // CELLS)
    place = cells[:, None] * CELLS + cells
    histogram = np.zeros((CELLS * CELLS, BINS))
    np.add.at(histogram, (place, lower % BINS), strength * (1 - share))
    np.add.at(histogram, (place, (lower + 1) % BINS), strength * share)
    return np.sqrt(histogram)


def _unit(values: np.ndarray) -> np.ndarray:
    return values / (np.linalg.norm(values) + 1e-6)


def load_sheet(file: Path, concepts: Sequence[str], *, colour: bool = True) -> Gallery:
    """A gallery from a sheet of square tiles: ``len(concepts)`` tiles in a row, one row for each style."""
    sheet = Image.open(file).convert("RGB")
    side = sheet.width // len(concepts)
    tiles = [
        sheet.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
        for y in range(sheet.height // side)
        for x in range(len(concepts))
    ]
    return Gallery.of(tiles, list(concepts) * (sheet.height // side), colour=colour)
