"""A folder of pictures: what is read, and that every fault is found at once, before anything else happens."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdlora.data.captions import has_word, with_trigger
from sdlora.data.items import Item, dataset_digest, scan
from sdlora.errors import DataError
from tests.conftest import write_pictures


def scanned(folder: Path, trigger: str = "zorb") -> list[Item]:
    return scan(folder, trigger=trigger, caption_extension=".txt", background="#ffffff")


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a party", "art", "art, a party"),
        ("modern art, a cat", "art", "modern art, a cat"),
        ("ART deco", "art", "ART deco"),
        ("a fox (zorb)", "zorb", "a fox (zorb)"),
        ("zorbs", "zorb", "zorb, zorbs"),
        ("ein Bär", "är", "är, ein Bär"),
        ("c++ code", "c++", "c++ code"),
    ],
)
def test_trigger_is_a_word_not_a_substring(caption: str, trigger: str, expected: str) -> None:
    assert with_trigger(caption, trigger) == expected


@given(st.text(max_size=60), st.text(min_size=1, max_size=20).filter(lambda text: text.strip() == text))
def test_trigger_is_in_every_caption_and_added_once(caption: str, trigger: str) -> None:
    once = with_trigger(caption, trigger)
    assert has_word(once, trigger) or not trigger[0].isalnum() or not trigger[-1].isalnum()
    if has_word(once, trigger):
        assert with_trigger(once, trigger) == once


def test_pairs_pictures_with_captions(tmp_path: Path) -> None:
    items = scanned(write_pictures(tmp_path / "ü 空 a b", 3))
    assert [item.caption for item in items] == [f"zorb, a thing of kind {i}" for i in range(3)]
    assert {(item.width, item.height) for item in items} == {(64, 64)}


def test_every_fault_in_one_report(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 10)
    (folder / "0.png").write_bytes(b"")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "2.png").write_text("not a picture")
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text("word " * 300)
    (folder / "5.txt").write_bytes("Bär".encode("latin-1"))
    (folder / "6.txt").write_text("  \n ")
    (folder / "7.txt").rename(folder / "7.caption")
    Image.new("RGB", (64, 64)).save(folder / "8.jpg")
    with pytest.raises(DataError) as caught:
        scanned(folder)
    problems = dict.fromkeys(caught.value.problems)
    expected = {
        "0.png": "empty file",
        "1.png": "damaged picture",
        "2.png": "not a picture",
        "3.png": "no caption; write 3.txt",
        "4.txt": "300 words",
        "5.txt": "not UTF-8",
        "6.txt": "empty; write what",
        "7.png": "found 7.caption; set data.caption_extension",
        "8.jpg": "shares its caption file with 8.png",
    }
    assert len(problems) == len(expected)
    for name, message in expected.items():
        assert [p for p in problems if f"{os.sep}{name}: " in p and message in p], (name, message, problems)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scanned(tmp_path / "none")
    with pytest.raises(DataError, match="no picture among its 0 entries"):
        scanned(tmp_path)


def test_digest_tells_pixels_and_captions_apart(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 3)
    before = dataset_digest(scanned(folder))
    assert dataset_digest(scanned(folder)) == before
    (folder / "1.txt").write_text("something else")
    changed = dataset_digest(scanned(folder))
    assert changed != before
    pixels = np.asarray(Image.open(folder / "2.png")).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "2.png")
    assert dataset_digest(scanned(folder)) not in (before, changed)
