"""What one decoding of an image tells."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageCms, ImageStat

from .decoding import format_of, has_alpha, opened, orientation_of, turned
from .images import flattened

if TYPE_CHECKING:
    pass

THUMBNAIL_SIDE = 32
_DRAFT_SIDE = 256
"""A JPEG is looked at in the smallest of its scales (1, 1/2, 1/4, 1/8) whose sides are both as long as this."""
_STRIP = 256
"""Rows that are looked at together."""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What one decoding of an image tells. ``width`` and ``height`` are upright, in pixels."""

    width: int
    height: int
    format: str
    """A key of ``SUFFIXES``."""
    mode: str
    """Pillow's, as the file has it: RGB, RGBA, P, L, CMYK, I;16 …"""
    bits: int
    """Of each channel in the file."""
    orientation: int
    """EXIF's; 1 is upright."""
    frames: int
    alpha: Literal["none", "opaque", "used"]
    transparent: float
    """Share of its pixels of which nothing is seen."""
    hidden_colour: bool
    """Whether those hold an image of their own, which programs that drop the alpha channel show."""
    profile: str | None
    """The name of its colour profile, where that is not sRGB."""
    digest: str
    """The same for images that are the same: SHA-256 over the pixels on white, or over the file of a JPEG too large
    for that to be quick."""
    thumbnail: bytes
    """32 x 32 grey levels, row by row."""
    mean: float
    """Of the grey levels, 0 to 255."""
    spread: float
    """Largest standard deviation of a colour channel, of 255; 0 where the image is one colour."""


def examine(file: Path) -> ImageFacts:
    """Decode ``file`` once, as far as is needed to know that it is whole.

    Memory is that of the decoded image. A large JPEG is decoded at down to an eighth of its scale, for which all of its
    data is read nevertheless.

    Raises:
        ImageError: as ``open_image``.
    """
    with opened(file) as image:
        # The orientation last: to find it, Pillow decodes all of a PNG.
        shape, mode, bits, orientation = image.size, image.mode, _bits(image), orientation_of(image)
        form, profile = format_of(image), _profile(image)
        drafted = _draft(image, form)
        image.load()
        # What is left to undo: Pillow turns a TIFF itself when it is loaded.
        left = orientation_of(image)
        if not drafted:
            shape = image.size
        alpha, transparent, hidden = _alpha_facts(image)
        small = turned(_small(image), left)
        grey = small.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
        digest = _file_digest(file) if drafted else _pixel_digest(turned(image, left))
        return ImageFacts(
            width=shape[left >= 5],
            height=shape[left < 5],
            format=form,
            mode=mode,
            bits=bits,
            orientation=orientation,
            # When all else is done: counting goes through the frames, and the first is lost.
            frames=_frames(image, form),
            alpha=alpha,
            transparent=transparent,
            hidden_colour=hidden,
            profile=profile,
            digest=digest,
            thumbnail=grey.tobytes(),
            mean=ImageStat.Stat(grey).mean[0],
            spread=max(ImageStat.Stat(small).stddev),
        )


def _frames(image: Image.Image, form: str) -> int:
    try:
        return 1 if form == "JPEG" else getattr(image, "n_frames", 1)
    except Exception:  # Those behind the first may be damaged, and nobody asks for them.
        return 1


def _bits(image: Image.Image) -> int:
    """Before it is loaded: Pillow reads 16 bits of colour as 8, and tells so in the decoder's arguments alone."""
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


def _draft(image: Image.Image, form: str) -> bool:
    if form != "JPEG" or min(image.size) < 2 * _DRAFT_SIDE:
        return False
    image.draft(image.mode, (_DRAFT_SIDE, _DRAFT_SIDE))
    return True


def _alpha_facts(image: Image.Image) -> tuple[Literal["none", "opaque", "used"], float, bool]:
    """Kind, share of pixels that are not seen, whether those differ among each other."""
    if not has_alpha(image):
        return "none", 0.0, False
    full = image if image.mode == "RGBA" else image.convert("RGBA")
    alpha = full.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return "opaque", 0.0, False
    unseen = alpha.point([255] + [0] * 255)
    count = unseen.histogram()[255]
    if not count:
        return "used", 0.0, False
    levels = np.zeros(3 * 256, np.int64)
    for box in _strips(full.size):
        levels += full.crop(box).convert("RGB").histogram(unseen.crop(box))
    used = [np.flatnonzero(band) for band in levels.reshape(3, 256)]
    return "used", count / (full.width * full.height), any(band[-1] - band[0] > 16 for band in used)


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that make up an image of ``size``, so that what is done to each needs little memory."""
    for top in range(0, size[1], _STRIP):
        yield 0, top, size[0], min(top + _STRIP, size[1])


def _small(image: Image.Image) -> Image.Image:
    """On white, as RGB, with sides of at most twice the thumbnail's; its proportions do not matter."""
    side = 2 * THUMBNAIL_SIDE
    if image.mode not in ("RGB", "L", "RGBA", "CMYK"):
        image = flattened(image, "#ffffff")
    # The alpha channel of a grey or RGB image may be a colour in its info, which scaling would blur.
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return flattened(image.resize((side, side), Image.Resampling.BOX), "#ffffff")


def _pixel_digest(image: Image.Image) -> str:
    if image.mode.startswith(("I", "F")):
        image = flattened(image, "#ffffff")
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    for box in _strips(image.size):
        digest.update(flattened(image.crop(box), "#ffffff").tobytes())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
