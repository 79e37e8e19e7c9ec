"""Image files as upright RGB pictures."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from ..errors import DataError
from .buckets import Placement

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif"})


def open_picture(file: Path, background: str = "#ffffff") -> Image.Image:
    """Decode ``file`` fully: EXIF orientation applied, transparency composited on ``background``, as RGB.

    Raises:
        DataError: empty, truncated, not a picture, or so large that it must be an attack.
    """
    if file.stat().st_size == 0:
        raise DataError(f"{file}: empty file (0 bytes); replace or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                picture.load()
                return _flatten(ImageOps.exif_transpose(picture), background)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{file}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise DataError(f"{file}: not a picture, or of a kind that cannot be read; replace or remove it") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"{file}: damaged picture ({error}); replace or remove it") from None


def _flatten(picture: Image.Image, background: str) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        levels = np.asarray(picture, np.float64)
        top = 65535.0 if levels.max() > 255 else 255.0
        return Image.fromarray((levels / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, ImageColor.getrgb(background))
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def place(picture: Image.Image, placement: Placement) -> torch.Tensor:
    """Scale and crop as planned -> float32 (3, height, width) in [-1, 1]."""
    scaled = picture.resize((placement.scaled_width, placement.scaled_height), Image.Resampling.LANCZOS)
    left, top = placement.left, placement.top
    pixels = np.asarray(scaled.crop((left, top, left + placement.width, top + placement.height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(127.5).sub(1)
