"""The text in an image file: what PNG keeps as text, and the comment of EXIF in which A1111 writes its parameters."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import DataError

_EXIF, _USER_COMMENT = 0x8769, 0x9286
_CODE = 8
"""Bytes at the start of EXIF's comment that name its encoding."""


@dataclass(frozen=True, kw_only=True)
class ImageText:
    """What an image file says of itself."""

    text: dict[str, str]
    """Key -> text; ``parameters`` is the recipe in A1111's form."""
    size: tuple[int, int]
    """Width and height in pixels."""
    format: str


def image_text(file: Path) -> ImageText:
    """The text in an image. Raises ``DataError`` if it is missing or cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                text = {
                    key: value for key, value in image.info.items() if isinstance(value, str) and isinstance(key, str)
                }
                comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
                size, form = image.size, image.format or "unknown"
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image: {error}") from None
    if "parameters" not in text and isinstance(comment, bytes | str) and comment:
        text["parameters"] = _comment(comment)
    return ImageText(text=text, size=size, format=form)


def _comment(comment: bytes | str) -> str:
    """EXIF's comment as A1111 writes it: a code of eight bytes, then UTF-16 with the most significant byte first."""
    if isinstance(comment, str):
        return comment
    encoding = "utf-16-be" if comment.startswith(b"UNICODE") else "utf-8"
    return comment[_CODE:].decode(encoding, errors="replace").rstrip("\0")
