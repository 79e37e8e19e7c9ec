"""Text drawn into images: its font, and how it is cut or wrapped to a width in pixels."""

from __future__ import annotations

import unicodedata
from functools import cached_property
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = tuple(Path(__file__).with_name(f"letters-{name}.ttf") for name in ("western", "eastern", "korean"))
"""Letters of Latin, Greek and Cyrillic; of Chinese and Japanese; of Korean (see NOTICE)."""
_NO_LETTER = "\uffff"
"""No font has it, so that it is drawn as every missing letter is."""
_LONGEST = 200
"""Characters of a line that are looked at; no image is wide enough for more."""


class Lettering:
    """Letters of one size in pixels. Line breaks and other control characters are drawn as spaces."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: dict[str, int] = {}

    @cached_property
    def _fonts(self) -> tuple[ImageFont.FreeTypeFont, ...]:
        """Pillow's own, which has little more than ASCII, and those that are used where it lacks a letter."""
        own = ImageFont.load_default(self._size)
        assert isinstance(own, ImageFont.FreeTypeFont)  # It always is if a size is given.
        return own, *(ImageFont.truetype(BytesIO(file.read_bytes()), self._size) for file in FONTS)

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """``text`` in pieces, each with the first font that has its letters."""
        return [(self._fonts[number], "".join(run)) for number, run in groupby(_plain(text), self._font_of)]

    def _font_of(self, char: str) -> int:
        if char not in self._known:
            has = [number for number, font in enumerate(self._fonts) if _drawn(font, char) != _drawn(font, _NO_LETTER)]
            self._known[char] = has[0] if has else 0
        return self._known[char]

    def length(self, text: str) -> float:
        """Width of ``text`` in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    @property
    def height(self) -> int:
        """From the top of a line to the lowest letter's end, in pixels."""
        return round(self._fonts[0].getbbox("Ag")[3])

    def draw(
        self, pen: ImageDraw.ImageDraw, left_top: tuple[float, float], text: str, ink: tuple[int, int, int]
    ) -> None:
        """Draw ``text`` in one line, from ``left_top`` in pixels to the right."""
        left, top = left_top
        base = top + self._fonts[0].getmetrics()[0]
        for font, run in self._runs(text):
            pen.text((left, base), run, ink, font, anchor="ls")
            left += font.getlength(run)

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


def _drawn(font: ImageFont.FreeTypeFont, char: str) -> bytes:
    canvas = Image.new("L", (round(2 * font.size), round(2 * font.size)))
    ImageDraw.Draw(canvas).text((0, 0), char, 255, font)
    return canvas.tobytes()
