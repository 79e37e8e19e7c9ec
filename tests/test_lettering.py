"""Text on sheets: letters beyond ASCII are drawn as letters."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdlora.data.lettering import Lettering


def drawn(text: str) -> np.ndarray:
    canvas = Image.new("L", (120, 24), 255).convert("RGB")
    Lettering(14).draw(ImageDraw.Draw(canvas), (2, 2), text, (0, 0, 0))
    return np.asarray(canvas)


@pytest.mark.parametrize("text", ["é", "ü", "ñ", "ß", "Ж", "日本", "か", "한국어", "a é 日 글"])
def test_no_letter_is_a_box(text: str) -> None:
    for char in text.replace(" ", ""):
        pixels = drawn(char)
        assert (pixels < 128).any()
        assert not np.array_equal(pixels, drawn("\uffff"))
    letters = [drawn(char).tobytes() for char in dict.fromkeys(text)]
    assert len(set(letters)) == len(letters)


def test_an_accent_of_its_own_is_composed() -> None:
    assert np.array_equal(drawn("e\u0301"), drawn("é"))
    assert not np.array_equal(drawn("e"), drawn("é"))


def test_mixed_text_is_as_wide_as_its_letters_and_is_cut_to_fit() -> None:
    letters = Lettering(14)
    assert letters.length("ab日本cd") == letters.length("ab") + letters.length("日本") + letters.length("cd")
    assert letters.length(letters.fitted("日本" * 90, 60)) <= 60
    assert all(letters.length(row) <= 60 for row in letters.wrapped("日本 é " * 40, 60, lines=3))
    columns = np.flatnonzero((drawn("ab日本cd") < 128).any(axis=(0, 2)))
    assert columns[-1] <= 2 + letters.length("ab日本cd")


def test_line_breaks_are_spaces() -> None:
    assert np.array_equal(drawn("a\nb"), drawn("a b"))
