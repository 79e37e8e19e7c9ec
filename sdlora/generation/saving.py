"""Image files with their recipe inside, and names that never replace a file that was not named in full."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SdloraError
from ..files import png_bytes, write_new, write_whole

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Ending in lower case -> Pillow's name of the format."""
_QUALITY = 95
_EXIF, _USER_COMMENT = 0x8769, 0x9286


def encoded(image: Image.Image, ending: str, parameters: str) -> bytes:
    """``image`` as the bytes of a file with ``ending``, one of ``FORMATS``.

    ``parameters`` are the text chunk of that name in a PNG, and EXIF's UserComment in UTF-16 in JPEG and WebP, as A1111
    writes them.
    """
    buffer, kind = BytesIO(), FORMATS[ending.lower()]
    if kind == "PNG":
        return png_bytes(image, [("parameters", parameters)])
    from PIL import Image as Pillow

    exif = Pillow.Exif()
    exif.get_ifd(_EXIF)[_USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
    image.save(buffer, kind, quality=_QUALITY, exif=exif)
    return buffer.getvalue()


def save_png(image: Image.Image, file: Path, parameters: str) -> None:
    """Write ``image`` with ``parameters`` inside as PNG. Raises as ``files.write_whole``."""
    write_whole(file, encoded(image, ".png", parameters))


@dataclass(frozen=True, kw_only=True)
class ImageTarget:
    """Where images are written: a folder in which names count up, or one file that was named in full."""

    path: Path
    ending: str
    is_folder: bool

    @classmethod
    def parse(cls, text: str) -> ImageTarget:
        """``FILE.png``, ``.jpg``, ``.jpeg`` or ``.webp``, else a folder; a folder may also end in a slash.

        Raises:
            SdloraError: a file of another format, a file where a folder is meant, or the reverse.
        """
        path = Path(text).expanduser()
        ending = path.suffix
        slash = text.endswith(("/", "\\"))
        if slash or path.is_dir() or not re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]{1,4}", ending):
            if not slash and path.is_dir() and ending.lower() in FORMATS:
                raise SdloraError(f"{text}: is a folder; name a file in it, or end it with / to write into the folder")
            if path.exists() and not path.is_dir():
                raise SdloraError(f"{text}: is a file; name a folder, or a file that ends in .png")
            return cls(path=path, ending=".png", is_folder=True)
        if ending.lower() not in FORMATS:
            raise SdloraError(
                f"{text}: images are not written as {ending}; use {', '.join(FORMATS)}, or end a folder's name with /"
            )
        return cls(path=path, ending=ending, is_folder=False)

    def save(self, image: Image.Image, parameters: str, *, seed: int, title: str, alone: bool) -> Path:
        """Write ``image`` and return its file.

        In a folder it is ``00001-SEED-TITLE.png``, one above the highest number there. A named file is replaced where
        ``image`` is ``alone``; of several, each is ``NAME-SEED.png``, and where that exists ``NAME-SEED-2.png``.

        Raises:
            OSError: the disk is full or cannot be written to; no partial file remains.
        """
        data = encoded(image, self.ending, parameters)
        if alone and not self.is_folder:
            write_whole(self.path, data)
            return self.path
        folder = self.path if self.is_folder else self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        names = self._numbered(f"{seed}-{title}") if self.is_folder else self._beside(seed)
        return next(file for file in names if write_new(file, data))

    def _numbered(self, name: str) -> Iterator[Path]:
        numbers = [int(match[1]) for file in self.path.iterdir() if (match := re.match(r"(\d{5,9})-", file.name))]
        for number in count(max(numbers, default=0) + 1):
            yield self.path / f"{number:05}-{name}{self.ending}"

    def _beside(self, seed: int) -> Iterator[Path]:
        stem = f"{self.path.stem}-{seed}"
        yield self.path.with_name(stem + self.ending)
        for number in count(2):
            yield self.path.with_name(f"{stem}-{number}{self.ending}")
