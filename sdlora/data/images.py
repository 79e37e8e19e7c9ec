"""Image files as upright RGB images, as masks, and as pixels."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageColor

from ..config.sections import MaskKind
from ..files import printable
from .buckets import Placement
from .decoding import ORIENTATION, ImageError, format_of, has_alpha, opened, orientation_of, turned
from .findings import Finding

if TYPE_CHECKING:
    import torch

WHITE = "#ffffff"


def open_image(file: Path, background: str = WHITE) -> Image.Image:
    """Decode ``file`` fully: first frame, EXIF orientation applied, transparency composited on ``background``, RGB.

    Raises:
        ImageError: empty, truncated, damaged, not an image, in a format whose package is not installed, or so large
            that it must be an attack.
    """
    with opened(file) as image:
        image.load()
        return flattened(turned(image, orientation_of(image)), background)


def open_alpha(file: Path) -> np.ndarray | None:
    """The alpha channel of ``file`` as float32 (height, width) in [0, 1], upright; None without one.

    Raises:
        ImageError: as ``open_image``.
    """
    with opened(file) as image:
        image.load()
        if not has_alpha(image):
            return None
        alpha = turned(image, orientation_of(image)).convert("RGBA").getchannel("A")
        return np.asarray(alpha, np.float32) / 255


def open_mask(image: Path, mask: Path | None, size: tuple[int, int], kind: MaskKind) -> np.ndarray | None:
    """Weight of each pixel of ``image`` in the loss: float32 (height, width) in [0, 1]; None where all are equal.

    Args:
        mask: the mask file, for ``files``; white counts, black does not.
        size: (width, height) of the upright image.

    Raises:
        ImageError: the mask cannot be decoded, or differs from the image in size.
    """
    if kind == "none" or (kind == "files" and mask is None):
        return None
    if kind == "alpha" or mask is None:
        return open_alpha(image)
    levels = np.asarray(open_image(mask, "#000000").convert("L"), np.float32) / 255
    if levels.shape != size[::-1]:
        raise ImageError(
            Finding(
                code="mask-size",
                severity="error",
                file=printable(mask),
                message=f"a mask of {levels.shape[1]} x {levels.shape[0]} pixels for an image of {size[0]} x {size[1]}",
                remedy="resize it to the size of the image",
            )
        )
    return levels


def write_upright(file: Path, target: Path) -> bool:
    """Write the image to ``target`` upright, in the same format; False, and nothing written, where that is impossible.

    A JPEG is saved at quality 98, which loses almost nothing; other formats without loss.

    Raises:
        ImageError: as ``open_image``.
        OSError: ``target`` cannot be written.
    """
    with opened(file) as image:
        image.load()
        form = format_of(image)
        if form not in ("PNG", "BMP", "TIFF", "WEBP", "JPEG"):
            return False
        options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
        if form == "JPEG":
            options = {"quality": 98, "subsampling": "4:4:4"}
        exif = image.getexif()
        upright = turned(image, orientation_of(image))
        exif.pop(ORIENTATION, None)
        if len(exif) and form not in ("BMP", "TIFF"):
            # A block that Pillow can read but not write is left out.
            with suppress(Exception):
                options["exif"] = exif.tobytes()
        if profile := image.info.get("icc_profile"):
            options["icc_profile"] = profile
    upright.info = {key: value for key, value in upright.info.items() if key == "transparency"}
    upright.save(target, format=form, **options)
    return True


def scale(image: Image.Image, placement: Placement) -> Image.Image:
    """The whole image at the scaled size of ``placement``."""
    return image.resize((placement.scaled_width, placement.scaled_height), Image.Resampling.LANCZOS)


def cut_out(scaled: Image.Image, placement: Placement, *, flipped: bool = False) -> np.ndarray:
    """Crop what ``scale`` returned, and mirror it where ``flipped`` -> uint8 (height, width, 3); (height, width) if grey."""
    left, top = placement.left, placement.top
    pixels = np.asarray(scaled.crop((left, top, left + placement.width, top + placement.height)))
    return np.ascontiguousarray(pixels[:, ::-1] if flipped else pixels)


def as_pixels(cut: np.ndarray) -> torch.Tensor:
    """uint8 (height, width, 3) from ``cut_out`` -> float32 (3, height, width) in [-1, 1]."""
    import torch

    return torch.from_numpy(cut.copy()).permute(2, 0, 1).float().div(127.5).sub(1)


def place(image: Image.Image, placement: Placement) -> torch.Tensor:
    """Scale and crop -> float32 (3, height, width) in [-1, 1]."""
    return as_pixels(cut_out(scale(image, placement), placement))


def flattened(image: Image.Image, background: str) -> Image.Image:
    """``image`` as RGB, composited on ``background`` where it is transparent."""
    if image.mode.startswith(("I", "F")):
        levels = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
        highest = levels.max(initial=0.0)
        top = 65535.0 if highest > 255 else 255.0 if highest > 1 or image.mode != "F" else 1.0
        return Image.fromarray((levels / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if has_alpha(image):
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, ImageColor.getrgb(background))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
