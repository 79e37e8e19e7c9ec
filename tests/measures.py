"""Is an image in one of the two sample styles? A few lines of arithmetic on its pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image


def blueness(image: Image.Image) -> float:
    """Share of the pixels in which blue leads red by 30 of 255, as it does in blue paper and in light ink on it."""
    red, _, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.float32), -1, 0)
    return float((blue - red > 30).mean())


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
