"""Facts about an image file from one decoding of it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageStat

from .decoding import SIDEWAYS, format_of, has_alpha, opened, orientation_of, turned
from .images import WHITE, flattened
from .kept_images import KeptImages

THUMBNAIL_SIDE = 32
_REDUCED_SIDE = 256
"""A JPEG is decoded at the smallest of its scales (1, 1/2, 1/4, 1/8) at which both sides have at least this length."""
_STRIP = 256
"""Rows that are processed together, to save memory."""

AlphaUse = Literal["none", "opaque", "used"]
"""Whether an image has an alpha channel, and whether that makes any pixel transparent."""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What one decoding of an image shows. ``width`` and ``height`` are upright, in pixels."""

    width: int
    height: int
    format: str
    """A key of ``SUFFIXES``."""
    mode: str
    """Pillow's, as the file has it: RGB, RGBA, P, L, CMYK, I;16 …"""
    bits: int
    """Bits of each channel in the file."""
    orientation: int
    """EXIF's; 1 is upright."""
    frames: int
    alpha: AlphaUse
    transparent: float
    """Share of the pixels that are fully transparent."""
    hidden_colour: bool
    """Whether fully transparent pixels differ in colour, which programs that drop the alpha channel show."""
    profile: str | None
    """Name of the colour profile; None for sRGB."""
    digest: str
    """The same for images that look the same on any background.

    SHA-256 over the upright size and RGB pixels; over RGBA, with fully transparent pixels zeroed, where transparency is
    used; over the bytes of the file for a JPEG so large that only a reduced scale is decoded.
    """
    thumbnail: bytes
    """32 x 32 grey levels, row by row."""
    mean: float
    """Mean grey level, 0 to 255."""
    spread: float
    """Largest standard deviation of a colour channel, of 255; 0 where the image is one colour."""


def examine_image(file: Path, kept: KeptImages | None = None) -> ImageFacts:
    """Decode ``file`` once, far enough to know that it is complete.

    Needs the memory of the decoded image. A large JPEG is decoded at down to an eighth of its scale, which still reads
    all of its data; any other image is offered to ``kept``.

    Raises:
        ImageError: as ``open_image``.
    """
    with opened(file) as image:
        size, mode, bits, form, profile = image.size, image.mode, _bits(image), format_of(image), _profile(image)
        # After the others, since Pillow decodes all of a PNG to find it.
        orientation = orientation_of(image)
        reduced = _reduce(image, form)
        image.load()
        # Pillow turns a TIFF itself when it is loaded: only the rest is left to undo.
        rest = orientation_of(image)
        upright = turned(image, rest)
        if not reduced:
            size = upright.size
            if kept is not None:
                kept.offer(file, upright)
        elif rest in SIDEWAYS:
            size = size[::-1]
        alpha = _alpha_facts(upright)
        small = _small(upright)
        grey = small.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
        return ImageFacts(
            width=size[0],
            height=size[1],
            format=form,
            mode=mode,
            bits=bits,
            orientation=orientation,
            alpha=alpha.use,
            transparent=alpha.transparent,
            hidden_colour=alpha.hidden_colour,
            profile=profile,
            digest=_file_digest(file) if reduced else _pixel_digest(upright, alpha.use),
            thumbnail=grey.tobytes(),
            mean=ImageStat.Stat(grey).mean[0],
            spread=max(ImageStat.Stat(small).stddev),
            # Last, since counting the frames overwrites the first.
            frames=_frames(image, form),
        )


def _frames(image: Image.Image, form: str) -> int:
    try:
        return 1 if form == "JPEG" else getattr(image, "n_frames", 1)
    except Exception:  # Frames after the first may be damaged; they are not used.
        return 1


def _bits(image: Image.Image) -> int:
    """Bits of each channel of an image that is not loaded yet.

    Pillow reads 16 bits of colour as 8, and only the decoder's arguments show it.
    """
    if image.mode.startswith(("I;16", "F", "I")):
        return 16 if image.mode.startswith("I;16") else 32
    return 16 if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) else 8


def _profile(image: Image.Image) -> str | None:
    data = image.info.get("icc_profile")
    if not isinstance(data, bytes):
        return None
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(data))).strip()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if "srgb" in name.lower().replace(" ", "") else name


def _reduce(image: Image.Image, form: str) -> bool:
    """Have a large JPEG decoded at a reduced scale; False for any other image."""
    if form != "JPEG" or min(image.size) < 2 * _REDUCED_SIDE:
        return False
    image.draft(image.mode, (_REDUCED_SIDE, _REDUCED_SIDE))
    return True


@dataclass(frozen=True, kw_only=True)
class _Alpha:
    use: AlphaUse
    transparent: float = 0.0
    hidden_colour: bool = False


def _alpha_facts(image: Image.Image) -> _Alpha:
    if not has_alpha(image):
        return _Alpha(use="none")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return _Alpha(use="opaque")
    unseen = alpha.point([255] + [0] * 255)
    count = unseen.histogram()[255]
    if not count:
        return _Alpha(use="used")
    levels = np.zeros(3 * 256, np.int64)
    for box in _strips(rgba.size):
        levels += rgba.crop(box).convert("RGB").histogram(unseen.crop(box))
    used = [np.flatnonzero(band) for band in levels.reshape(3, 256)]
    return _Alpha(
        use="used",
        transparent=count / (rgba.width * rgba.height),
        hidden_colour=any(band[-1] - band[0] > 16 for band in used),
    )


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that make up an image of ``size``, so that processing each needs little memory."""
    for top in range(0, size[1], _STRIP):
        yield 0, top, size[0], min(top + _STRIP, size[1])


def _small(image: Image.Image) -> Image.Image:
    """``image`` as RGB on white, with sides of twice the thumbnail's; its proportions do not matter."""
    side = 2 * THUMBNAIL_SIDE
    if image.mode not in ("RGB", "L", "RGBA", "CMYK"):
        image = flattened(image, WHITE)
    # The alpha channel of a grey or RGB image may be a colour in its info, which scaling would blur.
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return flattened(image.resize((side, side), Image.Resampling.BOX), WHITE)


def _pixel_digest(upright: Image.Image, alpha: AlphaUse) -> str:
    if upright.mode.startswith(("I", "F")):
        upright = flattened(upright, WHITE)
    digest = hashlib.sha256(f"{upright.width}x{upright.height}".encode())
    for box in _strips(upright.size):
        strip = upright.crop(box)
        digest.update(_seen_rgba(strip) if alpha == "used" else flattened(strip, WHITE).tobytes())
    return digest.hexdigest()


def _seen_rgba(image: Image.Image) -> bytes:
    pixels = np.array(image.convert("RGBA"))
    pixels[pixels[..., 3] == 0] = 0
    return pixels.tobytes()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
