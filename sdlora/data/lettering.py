"""Text drawn into images: its font, and how it is cut or wrapped to a width in pixels."""

from __future__ import annotations

import unicodedata
from functools import cached_property

from PIL import ImageDraw, ImageFont

_LONGEST = 200
"""Characters of a line that are looked at; no image is wide enough for more."""


class Lettering:
    """Letters of one size in pixels. Line breaks and other control characters are drawn as spaces."""

    def __init__(self, size: int) -> None:
        self._size = size

    @cached_property
    def _font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(self._size)

    def length(self, text: str) -> float:
        """Width of ``text`` in pixels."""
        return self._font.getlength(_plain(text))

    @property
    def height(self) -> int:
        """From the top of a line to the lowest letter's end, in pixels."""
        return round(self._font.getbbox("Ag")[3])

    def draw(
        self, pen: ImageDraw.ImageDraw, left_top: tuple[float, float], text: str, ink: tuple[int, int, int]
    ) -> None:
        """Draw ``text`` in one line, from ``left_top`` in pixels to the right."""
        pen.text(left_top, _plain(text), ink, self._font)

    def fitted(self, text: str, width: float) -> str:
        """``text``, cut if it is wider than ``width`` pixels."""
        text = text[:_LONGEST]
        if self.length(text) <= width:
            return text
        while text and self.length(text + "…") > width:
            text = text[:-1]
        return text + "…"

    def wrapped(self, text: str, width: float, *, lines: int) -> list[str]:
        """At most ``lines`` lines of at most ``width`` pixels; a word that is wider is cut, and so is the last line."""
        words, rows = text.split(), []
        while words and len(rows) < lines:
            count = 1
            while count < len(words) and self.length(" ".join(words[: count + 1])) <= width:
                count += 1
            if len(rows) == lines - 1:
                count = len(words)
            rows.append(self.fitted(" ".join(words[:count]), width))
            words = words[count:]
        return rows


def _plain(text: str) -> str:
    """Letters and accents composed where Unicode has both in one, and nothing that breaks a line."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in composed)
