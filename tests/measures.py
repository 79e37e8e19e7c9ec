"""Is an image in one of the two sample styles? A few lines of arithmetic on its pixels. And which subjects to ask for."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.conftest import ROOT

SUBJECTS = (
    *("fox", "cat", "penguin", "duck", "butterfly", "tulip", "lemon", "tomato", "pizza", "rocket", "heart", "key"),
    *("star", "snowman", "sailboat"),
)
TRIGGERS = {"blueprint": "blupaper", "pixel": "pixgrid"}


def unseen_subjects() -> list[str]:
    """Twelve that the base knows and neither sample set shows."""
    trained = {file.stem.replace("-", " ") for file in (ROOT / "datasets" / "blueprint").glob("*.png")}
    unseen = [subject for subject in SUBJECTS if subject not in trained][:12]
    assert len(unseen) == 12
    return unseen


def blueness(image: Image.Image) -> float:
    """Share of the pixels that are as deep a blue as the paper of blueprints, or as the wash on it."""
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.float32), -1, 0)
    return float(((blue - red > 40) & (blue - green > 15) & (red < 110) & (green < 125)).mean())


def blockiness(image: Image.Image) -> float:
    """Share of all change between neighbouring pixels that lies on the borders of 8 px squares: 1/8 if it knows none."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    on_borders = total = 0.0
    for axis in (0, 1):
        change = np.abs(np.diff(pixels, axis=axis)).sum(axis=(1 - axis, 2))
        on_borders, total = on_borders + change[7::8].sum(), total + change.sum()
    return float(on_borders / max(total, 1.0))


MEASURES = {"blueprint": blueness, "pixel": blockiness}
THRESHOLDS = {"blueprint": 0.45, "pixel": 0.18}
"""From here on an image is on the style's side."""
