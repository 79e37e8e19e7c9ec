"""Image files: which formats are read, opening with one kind of error for every fault, and turning upright."""

from __future__ import annotations

import os
import threading
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from ..files import printable
from .findings import Finding

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
"""Pillow's name of a format -> extensions of its files, the usual one first. Other formats are not read."""
MAX_PIXELS = 178_956_970
"""Pillow refuses to open anything larger, as a decompression bomb."""
_PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
ORIENTATION = 0x0112
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
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations of which width and height are exchanged."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PIECE = 1 << 20
"""Bytes that are read at a time."""
_WARNINGS = threading.RLock()


class ImageError(DataError):
    """An image that cannot be used; ``finding.code`` is the kind of fault."""

    def __init__(self, finding: Finding):
        self.finding = finding
        super().__init__(str(finding))


@contextmanager
def opened(file: Path) -> Generator[Image.Image]:
    """Within the block, the open image.

    Raises:
        ImageError: whatever goes wrong within the block, except a lack of memory.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(32)
            if not head:
                raise _error(file, "image-empty", "empty file (0 bytes)", "replace or remove it")
            if head.startswith(_PNG):
                _check_sums(stream)
        _load_plugin(file, head)
        # Filters of warnings belong to the process, not to the thread: only one thread at a time may change them.
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_formats())
        with image:
            yield image
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on bytes that they do not expect.
        raise _error(file, *_explain(error)) from None


def _error(file: Path, code: str, message: str, remedy: str) -> ImageError:
    return ImageError(Finding(code=code, severity="error", file=printable(file), message=message, remedy=remedy))


def _explain(error: Exception) -> tuple[str, str, str]:
    """Code, message and remedy for what Pillow or the system raised."""
    match error:
        case Image.DecompressionBombError():
            return "image-too-large", f"more than {MAX_PIXELS:,} pixels", "make it smaller"
        case UnidentifiedImageError():
            return "image-unknown", "not an image, or in a format that cannot be read", "replace or remove it"
        case PermissionError():
            return "image-unreadable", f"cannot be read: {error.strerror}", "allow reading it"
        case FileNotFoundError():
            return "image-unreadable", "no such file", "check the folder"
    reason = str(error).strip() or type(error).__name__
    if isinstance(error, EOFError) or "truncated" in reason.lower():
        return "image-truncated", f"truncated image ({reason})", "replace or remove it"
    return "image-damaged", f"damaged image ({reason})", "replace or remove it"


def _load_plugin(file: Path, head: bytes) -> None:
    form = None
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and b"avif" not in head:
        form = "HEIF"
    elif head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        form = "JXL"
    if form is None or _has_plugin(form):
        return
    package = _PLUGINS[form][1]
    message = f"a {form} image, which Pillow reads with {package}"
    raise _error(file, "image-needs-package", message, f"pip install {package}")


def _check_sums(stream: BinaryIO) -> None:
    """Check the checksums of the chunks of a PNG that every reader needs; Pillow itself reports those that are cut short.

    Pillow ignores checksums: a byte that changed on the disk would become a streak in the image.
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
        stated = stream.read(4)
        if left == 0 and len(stated) == 4 and found != int.from_bytes(stated):
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


def format_of(image: Image.Image) -> str:
    """Pillow's name of the format: a key of ``SUFFIXES``."""
    # Phones write JPEG files with further images after the first, which Pillow calls MPO.
    return "JPEG" if image.format == "MPO" else str(image.format)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, from 1 (upright) to 8."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # A damaged EXIF block raises nearly anything, and says nothing about the pixels.
        return 1
    return value if value in _UPRIGHT else 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """``image`` upright, given its EXIF orientation."""
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def has_alpha(image: Image.Image) -> bool:
    """Whether the image has an alpha channel, or a colour that is transparent."""
    return "A" in image.getbands() or "transparency" in image.info
