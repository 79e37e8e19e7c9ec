"""Drawn images whose parts differ, and the formats that are always read."""

from __future__ import annotations

import numpy as np
from PIL import Image

ALWAYS = {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}, "bmp": {}, "tiff": {}, "gif": {}, "avif": {}}
LOSSLESS = ("png", "webp", "bmp", "tiff")


def quadrants(width: int = 60, height: int = 40) -> Image.Image:
    """Red and green above blue and white: different from each of its turns and mirror images."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    image.paste("white", (width // 2, height // 2, width, height))
    return image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
