"""Image files as upright RGB pictures, as masks, and as facts."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageStat, UnidentifiedImageError

from ..errors import DataError
from .buckets import Placement
from .findings import Finding, shown

if TYPE_CHECKING:
    import torch

EXTENSIONS = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
        *(".avif", ".heic", ".heif", ".hif", ".jxl"),
    }
)
SUFFIXES = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JXL": (".jxl",),
}
"""Pillow's name of a format -> how its files end, the usual spelling first. What is not here is not read."""
THUMBNAIL_SIDE = 32
MAX_PIXELS = 178_956_970
"""What has more is a decompression bomb to Pillow, which does not open it."""

_PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it; 1 is upright."""
_DRAFT_SIDE = 256
"""A JPEG is looked at in the smallest of its scales (1, 1/2, 1/4, 1/8) whose sides are both as long as this."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PIECE = 1 << 20
"""Bytes that are read at once."""
_STRIP = 256
"""Rows that are looked at together."""
_WARNINGS = threading.RLock()


class PictureError(DataError):
    """A picture that cannot be used; ``finding`` tells it apart from others."""

    def __init__(self, finding: Finding):
        self.finding = finding
        super().__init__(str(finding))


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """What one decoding of a picture tells. ``width`` and ``height`` are upright, in pixels."""

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
    """Whether those hold a picture of their own, which programs that drop the alpha channel show."""
    profile: str | None
    """The name of its colour profile, where that is not sRGB."""
    digest: str
    """The same for pictures that are the same: SHA-256 over the pixels on white, or over the file of a JPEG too large
    for that to be quick."""
    thumbnail: bytes
    """32 x 32 grey levels, row by row."""
    mean: float
    """Of the grey levels, 0 to 255."""
    spread: float
    """Largest standard deviation of a colour channel, of 255; 0 where the picture is one colour."""


def examine(file: Path) -> PictureFacts:
    """Decode ``file`` once, as far as is needed to know that it is whole.

    Memory is that of the decoded picture. A large JPEG is decoded at down to an eighth of its scale, for which all of its
    data is read nevertheless.

    Raises:
        PictureError: as ``open_picture``.
    """
    with _opened(file) as picture:
        # The orientation last: to find it, Pillow decodes all of a PNG.
        shape, mode, bits, orientation = picture.size, picture.mode, _bits(picture), _orientation(picture)
        form, profile = _format(picture), _profile(picture)
        drafted = _draft(picture, form)
        picture.load()
        # What is left to undo: Pillow turns a TIFF itself when it is loaded.
        left = _orientation(picture)
        if not drafted:
            shape = picture.size
        alpha, transparent, hidden = _alpha_facts(picture)
        small = _turned(_small(picture), left)
        grey = small.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
        digest = _file_digest(file) if drafted else _pixel_digest(_turned(picture, left))
        return PictureFacts(
            width=shape[left >= 5],
            height=shape[left < 5],
            format=form,
            mode=mode,
            bits=bits,
            orientation=orientation,
            # When all else is done: counting goes through the frames, and the first is lost.
            frames=_frames(picture, form),
            alpha=alpha,
            transparent=transparent,
            hidden_colour=hidden,
            profile=profile,
            digest=digest,
            thumbnail=grey.tobytes(),
            mean=ImageStat.Stat(grey).mean[0],
            spread=max(ImageStat.Stat(small).stddev),
        )


def open_picture(file: Path, background: str = "#ffffff") -> Image.Image:
    """Decode ``file`` fully: first frame, EXIF orientation applied, transparency composited on ``background``, as RGB.

    Raises:
        PictureError: empty, truncated, damaged, not a picture, of a format whose package is not installed, or so large
            that it must be an attack.
    """
    with _opened(file) as picture:
        picture.load()
        return _flatten(_turned(picture, _orientation(picture)), background)


def open_alpha(file: Path) -> np.ndarray | None:
    """The alpha channel of ``file`` as float32 (height, width) in [0, 1], upright; None where it has none.

    Raises:
        PictureError: as ``open_picture``.
    """
    with _opened(file) as picture:
        picture.load()
        if not _has_alpha(picture):
            return None
        alpha = _turned(picture, _orientation(picture)).convert("RGBA").getchannel("A")
        return np.asarray(alpha, np.float32) / 255


def open_mask(
    picture: Path, mask: Path | None, size: tuple[int, int], kind: Literal["none", "alpha", "files"]
) -> np.ndarray | None:
    """How much each pixel of ``picture`` weighs in the loss: float32 (height, width) in [0, 1]; None where all weigh alike.

    Args:
        mask: the file that holds it, for ``files``: white counts, black does not.
        size: (width, height) of the upright picture.

    Raises:
        PictureError: the mask cannot be decoded, or is of another size than the picture.
    """
    if kind == "none" or (kind == "files" and mask is None):
        return None
    if kind == "alpha" or mask is None:
        return open_alpha(picture)
    levels = np.asarray(open_picture(mask, "#000000").convert("L"), np.float32) / 255
    if levels.shape != size[::-1]:
        raise PictureError(
            Finding(
                code="mask-size",
                severity="error",
                file=shown(mask),
                message=f"a mask of {levels.shape[1]} x {levels.shape[0]} pixels for a picture of {size[0]} x {size[1]}",
                remedy="make it the size of its picture",
            )
        )
    return levels


def write_upright(file: Path, target: Path) -> bool:
    """Write the picture to ``target`` upright, in its own format; False, and nothing written, where it cannot be.

    A JPEG is saved at quality 98, which loses next to nothing; other formats without loss.

    Raises:
        PictureError: as ``open_picture``.
        OSError: ``target`` cannot be written.
    """
    with _opened(file) as picture:
        picture.load()
        form = _format(picture)
        if form not in ("PNG", "BMP", "TIFF", "WEBP", "JPEG"):
            return False
        options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
        if form == "JPEG":
            options = {"quality": 98, "subsampling": "4:4:4"}
        exif = picture.getexif()
        upright = _turned(picture, _orientation(picture))
        exif.pop(_ORIENTATION, None)
        if len(exif) and form not in ("BMP", "TIFF"):
            # A block that Pillow can read but not write is left out.
            with suppress(Exception):
                options["exif"] = exif.tobytes()
        if profile := picture.info.get("icc_profile"):
            options["icc_profile"] = profile
    upright.info = {key: value for key, value in upright.info.items() if key == "transparency"}
    upright.save(target, format=form, **options)
    return True


def scale(picture: Image.Image, placement: Placement) -> Image.Image:
    """The whole picture at the size that is planned."""
    return picture.resize((placement.scaled_width, placement.scaled_height), Image.Resampling.LANCZOS)


def cut_out(scaled: Image.Image, placement: Placement, *, flipped: bool = False) -> np.ndarray:
    """The planned part of what ``scale`` made, mirrored afterwards where ``flipped`` -> uint8 (height, width, 3)."""
    left, top = placement.left, placement.top
    pixels = np.asarray(scaled.crop((left, top, left + placement.width, top + placement.height)))
    return np.ascontiguousarray(pixels[:, ::-1] if flipped else pixels)


def as_pixels(cut: np.ndarray) -> torch.Tensor:
    """What ``cut_out`` gives -> float32 (3, height, width) in [-1, 1]."""
    import torch

    return torch.from_numpy(cut.copy()).permute(2, 0, 1).float().div(127.5).sub(1)


def place(picture: Image.Image, placement: Placement) -> torch.Tensor:
    """Scale and crop as planned -> float32 (3, height, width) in [-1, 1]."""
    return as_pixels(cut_out(scale(picture, placement), placement))


@contextmanager
def _opened(file: Path) -> Generator[Image.Image]:
    """The open picture; what goes wrong within the block is told as a ``PictureError``."""
    try:
        with file.open("rb") as stream:
            head = stream.read(32)
            if not head:
                raise PictureError(_fault(file, "picture-empty", "empty file (0 bytes)", "replace or remove it"))
            if head.startswith(_PNG):
                _check_sums(stream)
        _load_plugin(file, head)
        # The filters of warnings are the process's, not the thread's: one thread at a time may change them.
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(file, formats=_formats())
        with picture:
            yield picture
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(
            _fault(file, "picture-too-large", f"more than {MAX_PIXELS:,} pixels", "make it smaller")
        ) from None
    except UnidentifiedImageError:
        raise PictureError(
            _fault(
                file,
                "picture-unknown",
                "not a picture, or of a kind that cannot be read",
                "replace or remove it",
            )
        ) from None
    except PermissionError as error:
        raise PictureError(
            _fault(file, "picture-unreadable", f"cannot be read: {error.strerror}", "allow reading it")
        ) from None
    except FileNotFoundError:
        raise PictureError(_fault(file, "picture-unreadable", "no such file", "check the folder")) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on bytes that are not what they should be.
        reason = str(error).strip() or type(error).__name__
        cut = isinstance(error, EOFError) or "truncated" in reason.lower()
        code, what = ("picture-truncated", "truncated picture") if cut else ("picture-damaged", "damaged picture")
        raise PictureError(_fault(file, code, f"{what} ({reason})", "replace or remove it")) from None


def _fault(file: Path, code: str, message: str, remedy: str) -> Finding:
    return Finding(code=code, severity="error", file=shown(file), message=message, remedy=remedy)


def _load_plugin(file: Path, head: bytes) -> None:
    form = None
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and b"avif" not in head:
        form = "HEIF"
    elif head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        form = "JXL"
    if form is None or _has_plugin(form):
        return
    package = _PLUGINS[form][1]
    raise PictureError(
        _fault(
            file,
            "picture-needs-package",
            f"a {form} picture, which Pillow reads with {package}",
            f"pip install {package}",
        )
    )


def _check_sums(stream: BinaryIO) -> None:
    """Hold the chunks of a PNG that every reader needs against their checksums; where one is cut short, Pillow tells.

    Pillow does not look at them: to it, a byte that changed on the disk is a streak in the picture.
    """
    stream.seek(len(_PNG))
    while len(head := stream.read(8)) == 8:
        left, name = int.from_bytes(head[:4]), head[4:]
        if not name[:1].isupper():
            stream.seek(left + 4, os.SEEK_CUR)
            continue
        found = zlib.crc32(name)
        while left and (data := stream.read(min(left, _PIECE))):
            found = zlib.crc32(data, found)
            left -= len(data)
        told = stream.read(4)
        if left == 0 and len(told) == 4 and found != int.from_bytes(told):
            raise ValueError(f"the checksum of its {name.decode('latin-1')} chunk is wrong")


@cache
def _has_plugin(form: str) -> bool:
    try:
        module = import_module(_PLUGINS[form][0])
    except ImportError:
        return False
    if form == "HEIF":
        module.register_heif_opener()
    return True


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in (*SUFFIXES, "MPO") if name in Image.OPEN)


def _format(picture: Image.Image) -> str:
    """Phones write JPEG files with further pictures behind the first, which Pillow calls MPO."""
    return "JPEG" if picture.format == "MPO" else str(picture.format)


def _frames(picture: Image.Image, form: str) -> int:
    try:
        return 1 if form == "JPEG" else getattr(picture, "n_frames", 1)
    except Exception:  # Those behind the first may be damaged, and nobody asks for them.
        return 1


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # A damaged EXIF block raises nearly anything, and says nothing about the pixels.
        return 1
    return value if value in _UPRIGHT else 1


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return picture if method is None else picture.transpose(method)


def _bits(picture: Image.Image) -> int:
    """Before it is loaded: Pillow reads 16 bits of colour as 8, and tells so in the decoder's arguments alone."""
    if picture.mode.startswith(("I;16", "F", "I")):
        return 16 if picture.mode.startswith("I;16") else 32
    return 16 if any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ())) else 8


def _profile(picture: Image.Image) -> str | None:
    data = picture.info.get("icc_profile")
    if not isinstance(data, bytes):
        return None
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(data))).strip()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if "srgb" in name.lower().replace(" ", "") else name


def _draft(picture: Image.Image, form: str) -> bool:
    if form != "JPEG" or min(picture.size) < 2 * _DRAFT_SIDE:
        return False
    picture.draft(picture.mode, (_DRAFT_SIDE, _DRAFT_SIDE))
    return True


def _has_alpha(picture: Image.Image) -> bool:
    return "A" in picture.getbands() or "transparency" in picture.info


def _alpha_facts(picture: Image.Image) -> tuple[Literal["none", "opaque", "used"], float, bool]:
    """Kind, share of pixels that are not seen, whether those differ among each other."""
    if not _has_alpha(picture):
        return "none", 0.0, False
    full = picture if picture.mode == "RGBA" else picture.convert("RGBA")
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
    """Boxes that make up a picture of ``size``, so that what is done to each needs little memory."""
    for top in range(0, size[1], _STRIP):
        yield 0, top, size[0], min(top + _STRIP, size[1])


def _small(picture: Image.Image) -> Image.Image:
    """On white, as RGB, with sides of at most twice the thumbnail's; its proportions do not matter."""
    side = 2 * THUMBNAIL_SIDE
    if picture.mode not in ("RGB", "L", "RGBA", "CMYK"):
        picture = _flatten(picture, "#ffffff")
    # The alpha channel of a grey or RGB picture may be a colour in its info, which scaling would blur.
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return _flatten(picture.resize((side, side), Image.Resampling.BOX), "#ffffff")


def _flatten(picture: Image.Image, background: str) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        levels = np.nan_to_num(np.asarray(picture, np.float64), posinf=0.0, neginf=0.0)
        highest = levels.max(initial=0.0)
        top = 65535.0 if highest > 255 else 255.0 if highest > 1 or picture.mode != "F" else 1.0
        return Image.fromarray((levels / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if _has_alpha(picture):
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, ImageColor.getrgb(background))
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _pixel_digest(picture: Image.Image) -> str:
    if picture.mode.startswith(("I", "F")):
        picture = _flatten(picture, "#ffffff")
    digest = hashlib.sha256(f"{picture.width}x{picture.height}".encode())
    for box in _strips(picture.size):
        digest.update(_flatten(picture.crop(box), "#ffffff").tobytes())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
