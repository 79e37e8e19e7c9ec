"""Views of an image: which crop, flipped or not. All possible ones are known beforehand and encoded once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..randomness import Stream, generator
from .buckets import Placement
from .images import scale

CROPS = 5
"""Largest number of positions of a random crop: few enough that each is encoded once."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A crop of an image; ``flipped`` is mirrored after cropping. ``item`` is the image's number."""

    item: int
    placement: Placement
    flipped: bool

    @property
    def left(self) -> int:
        """Left edge of the crop in the scaled image, in pixels; for a flipped view in the mirrored scaled image."""
        spot = self.placement
        return spot.scaled_width - spot.width - spot.left if self.flipped else spot.left


@dataclass(frozen=True, kw_only=True)
class ViewSet:
    """The possible views of an image at one resolution, all of the same size."""

    item: int
    placements: tuple[Placement, ...]
    flips: bool

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.placements[0].width, self.placements[0].height

    def all(self) -> tuple[View, ...]:
        """Every view."""
        flips = (False, True) if self.flips else (False,)
        return tuple(
            View(item=self.item, placement=placement, flipped=flipped)
            for placement in self.placements
            for flipped in flips
        )

    def draw(self, *, seed: int, turn: int) -> View:
        """The view when the image is shown for the ``turn``-th time (from 0): a function of seed, image and turn."""

        def rng(stream: Stream) -> np.random.Generator:
            return generator(seed, stream, turn, self.item)

        count = len(self.placements)
        position = int(rng(Stream.CROP).integers(count)) if count > 1 else 0
        flipped = self.flips and bool(rng(Stream.FLIP).random() < 0.5)
        return View(item=self.item, placement=self.placements[position], flipped=flipped)


def crop_positions(placement: Placement) -> tuple[Placement, ...]:
    """Up to ``CROPS`` crops, evenly spread along the axis with more room, including both ends and the centre."""
    across = placement.scaled_width - placement.width
    down = placement.scaled_height - placement.height
    starts = sorted({max(across, down) * k // (CROPS - 1) for k in range(CROPS)})
    if across >= down:
        return tuple(replace(placement, left=start) for start in starts)
    return tuple(replace(placement, top=start) for start in starts)


def salient_crop(image: Image.Image, placement: Placement) -> Placement:
    """The crop with most detail along each axis that has room; of equals, the one nearest to the centre.

    Detail is the gradient's energy: the squared differences of neighbouring pixels' brightness, in the scaled image.
    """
    across = placement.scaled_width - placement.width
    down = placement.scaled_height - placement.height
    if not (across or down):
        return placement
    brightness = np.asarray(scale(image.convert("L"), placement), np.int64)
    energy = np.zeros_like(brightness)
    energy[:, 1:] += np.diff(brightness, axis=1) ** 2
    energy[1:] += np.diff(brightness, axis=0) ** 2
    left = _busiest(energy.sum(0), placement.width)
    rows = energy[:, left : left + placement.width].sum(1)
    return replace(placement, left=left, top=_busiest(rows, placement.height))


def _busiest(energy: np.ndarray, length: int) -> int:
    """Start of the window of ``length`` that holds most of ``energy``, (n,) int64."""
    running = np.concatenate([[0], energy.cumsum()])
    held = running[length:] - running[:-length]
    best = np.flatnonzero(held == held.max())
    return int(best[np.abs(best - (len(energy) - length) // 2).argmin()])
