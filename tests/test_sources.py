"""Folders and sets: what is found, with which captions and masks, and every fault at once."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlora.config.sections import DataSection, SetSection
from sdlora.data.findings import raise_errors
from sdlora.data.sources import Listing, find_sources
from sdlora.errors import DataError
from tests.conftest import write_images
from tests.sets import codes, examined, found, images_in, listed, put, texts


def test_pairs_images_with_captions(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "ü 空 a b", 3)
    sources = found(folder)
    assert texts(sources) == {f"{i}.png": (f"a thing of kind {i}",) for i in range(3)}
    assert [source.file for source in sources] == [folder / f"{i}.png" for i in range(3)]
    assert [source.caption_file for source in sources] == [folder / f"{i}.txt" for i in range(3)]
    assert sources[0].rules.plain(sources[0].captions) == "zorb, a thing of kind 0"
    assert {(s.role, s.repeats, s.loss_weight, s.mask, s.set_number) for s in sources} == {("train", 1, 1.0, None, 0)}


def test_every_fault_in_one_report(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 12)
    (folder / "0.png").write_bytes(b"")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "2.png").write_text("not an image")
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text("word " * 300)
    (folder / "5.txt").write_bytes("Bär".encode("latin-1"))
    (folder / "6.txt").write_text("  \n ")
    (folder / "7.txt").rename(folder / "7.caption")
    Image.new("RGB", (64, 64)).save(folder / "8.jpg")
    (folder / "9.txt").write_bytes(b"x" * 100_000)
    listing = listed(folder)
    _, faults = examined(listing)
    with pytest.raises(DataError) as caught:
        raise_errors((*listing.findings, *faults))
    problems = dict.fromkeys(caught.value.problems)
    expected = {
        "0.png": "empty file",
        "1.png": "image",
        "2.png": "not an image",
        "3.png": "no caption; write 3.txt",
        "4.txt": "300 words",
        "5.txt": "not UTF-8",
        "6.txt": "empty; write what",
        "7.png": "found 7.caption; set data.caption_extension",
        "8.jpg": "shares its caption file with 8.png",
        "9.txt": "more than 65,536 bytes",
    }
    assert len(problems) == len(expected)
    for name, message in expected.items():
        assert [p for p in problems if f"{os.sep}{name}: " in p and message in p], (name, message, problems)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    assert codes(listed(tmp_path / "none")) == [("folder-missing", "error", "none")]
    assert "no such folder" in str(listed(tmp_path / "none").findings[0])
    put(tmp_path / "file.txt", "x")
    assert "not a folder" in str(listed(tmp_path / "file.txt").findings[0])
    empty = tmp_path / "empty"
    put(empty / "readme.md", "x")
    assert codes(listed(empty)) == [("folder-empty", "error", "empty")]
    assert "no image among its 1 files; add images whose names end in .avif .bmp" in str(listed(empty).findings[0])


def test_folders_within_are_searched_and_repeat_folders_give_repeats_and_class(tmp_path: Path) -> None:
    put(tmp_path / "a.png"), put(tmp_path / "a.txt", "top")
    put(tmp_path / "10_old house" / "b.png"), put(tmp_path / "10_old house" / "b.txt", "a house")
    put(tmp_path / "3_bare" / "c.png")
    put(tmp_path / "3_bare" / "deep" / "d.png")
    put(tmp_path / "3_bare" / "2_other_thing" / "e.png")
    put(tmp_path / "plain" / "f.png"), put(tmp_path / "plain" / "f.txt", "f")
    put(tmp_path / "4_" / "g.png"), put(tmp_path / "4_" / "g.txt", "g")
    for ignored in (".hidden/x.png", ".y.png", "__MACOSX/z.png", "b.npz", "Thumbs.db", "readme.txt", "a.safetensors"):
        put(tmp_path / ignored, "ignored")
    sources = found(tmp_path)
    assert {source.name: (source.repeats, source.captions) for source in sources} == {
        "10_old house/b.png": (10, ("a house",)),
        "3_bare/2_other_thing/e.png": (2, ("other_thing",)),
        "3_bare/c.png": (3, ("bare",)),
        "3_bare/deep/d.png": (3, ("bare",)),
        "4_/g.png": (4, ("g",)),
        "a.png": (1, ("top",)),
        "plain/f.png": (1, ("f",)),
    }
    assert [source.name for source in sources] == sorted(source.name for source in sources)
    flat = find_sources(
        DataSection(sets=(SetSection(images=str(tmp_path), repeats=5, subfolders=False),), trigger="zorb")
    )
    assert {source.name: source.repeats for source in flat.sources} == {"a.png": 5}
    multiplied = find_sources(DataSection(sets=(SetSection(images=str(tmp_path), repeats=5),), trigger="zorb"))
    assert {s.name: s.repeats for s in multiplied.sources}["10_old house/b.png"] == 50


def test_repeat_folders_that_are_likely_none(tmp_path: Path) -> None:
    put(tmp_path / "a.png"), put(tmp_path / "a.txt", "a")
    put(tmp_path / "2024_holiday" / "b.png"), put(tmp_path / "2024_holiday" / "b.txt", "b")
    put(tmp_path / "0_off" / "c.png")
    listing = listed(tmp_path)
    assert codes(listing) == [("repeats-high", "warning", "2024_holiday"), ("repeats-zero", "warning", "0_off")]
    assert {source.name: source.repeats for source in listing.sources} == {"2024_holiday/b.png": 2024, "a.png": 1}


def test_a_class_prompt_does_not_hide_captions_that_were_missed(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / "2_house" / f"{i}.png"), put(tmp_path / "2_house" / f"{i}.caption", "a house")
    assert codes(listed(tmp_path)) == [("caption-extension", "error", tmp_path.name)]
    put(tmp_path / "2_house" / "0.txt", "a house")
    put(tmp_path / "2_house" / "3.png")
    listing = listed(tmp_path)
    assert ("caption-missing", "warning", "3.png") in codes(listing)
    assert "trained on 'house'" in str(
        next(finding for finding in listing.findings if finding.code == "caption-missing")
    )


@pytest.mark.parametrize("extension", [".caption", "caption", "CAPTION"])
def test_the_extension_of_captions_may_have_its_dot_or_not(tmp_path: Path, extension: str) -> None:
    put(tmp_path / "a.png"), put(tmp_path / "a.caption", "one")
    put(tmp_path / "b.c.PNG", (tmp_path / "a.png").read_bytes()), put(tmp_path / "b.c.Caption", "two")
    assert texts(found(tmp_path, caption_extension=extension)) == {"a.png": ("one",), "b.c.PNG": ("two",)}


def test_captions_of_another_extension_are_counted(tmp_path: Path) -> None:
    for i in range(24):
        put(tmp_path / f"{i}.png"), put(tmp_path / f"{i}.caption", "x")
    listing = listed(tmp_path)
    assert [str(finding) for finding in listing.findings] == [
        f'{tmp_path}: found 24 .caption files; .txt is expected; set data.caption_extension = ".caption"'
    ]
    assert codes(listed(tmp_path, allow_missing_captions=True)) == [("caption-extension", "warning", tmp_path.name)]
    for i in range(24):
        put(tmp_path / f"{i}.txt", "x")
    assert codes(listed(tmp_path)) == [("caption-extra", "note", tmp_path.name)]


def test_captions_that_are_nowhere(tmp_path: Path) -> None:
    put(tmp_path / "a.png"), put(tmp_path / "b.png"), put(tmp_path / "b.png.txt", "x")
    put(tmp_path / "C.png"), put(tmp_path / "c.txt", "x")
    put(tmp_path / "d.png"), put(tmp_path / "d.txt", "d")
    put(tmp_path / "loose.txt", "x"), put(tmp_path / "e.psd", "8BPS"), put(tmp_path / "e.txt", "x")
    listing = listed(tmp_path)
    assert codes(listing) == [
        ("caption-missing", "error", "C.png"),
        ("caption-missing", "error", "a.png"),
        ("caption-missing", "error", "b.png"),
        ("caption-unused", "warning", "loose.txt"),
        ("image-format", "warning", "e.psd"),
    ]
    messages = "\n".join(map(str, listing.findings))
    assert "a.png: no caption; write a.txt beside it" in messages
    assert "b.png: no caption; rename b.png.txt as b.txt" in messages
    assert "C.png: no caption; rename c.txt as C.txt" in messages
    allowed = listed(tmp_path, allow_missing_captions=True)
    assert {finding.severity for finding in allowed.findings} == {"warning"}
    assert texts(allowed.sources)["a.png"] == ()


def test_a_folder_without_any_caption_is_reported_once(tmp_path: Path) -> None:
    for i in range(5):
        put(tmp_path / f"{i}.png")
    listing = listed(tmp_path)
    assert codes(listing) == [("caption-missing", "error", tmp_path.name)]
    assert "none of its 5 images has a caption; write 0.txt and so on" in str(listing.findings[0])


def test_lines_of_a_caption_are_joined_drawn_or_left(tmp_path: Path) -> None:
    put(tmp_path / "a.png"), put(tmp_path / "a.txt", "\ufeff one  cat \r\n\r\n two cats\t\n one cat\n")
    assert texts(found(tmp_path))["a.png"] == ("one cat two cats one cat",)
    assert texts(found(tmp_path, caption_lines="draw"))["a.png"] == ("one cat", "two cats")
    listing = listed(tmp_path, caption_lines="first")
    assert texts(listing.sources)["a.png"] == ("one cat",)
    assert codes(listing) == [("caption-lines", "warning", "a.txt")]


def test_accents_are_matched_however_they_are_written(tmp_path: Path) -> None:
    composed, taken_apart = (unicodedata.normalize(form, "Bär é") for form in ("NFC", "NFD"))
    put(tmp_path / f"{taken_apart}.png"), put(tmp_path / f"{composed}.txt", "a bear")
    put(tmp_path / "metadata.csv", f"file_name,loss_weight\n{composed}.png,2\n")
    (source,) = found(tmp_path)
    assert (source.captions, source.loss_weight) == (("a bear",), 2.0)


def test_links_may_run_in_circles_and_names_be_no_text(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.png"), put(tmp_path / "in" / "a.txt", "a")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    put(tmp_path / "elsewhere" / "b.png"), put(tmp_path / "elsewhere" / "b.txt", "b")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    with open(os.fsencode(tmp_path / "in") + b"/\xff.png", "wb") as stream:
        stream.write(b"x")
    listing = listed(tmp_path / "in")
    assert sorted(texts(listing.sources)) == ["a.png", "linked/b.png"]
    assert [code for code, *_ in codes(listing)] == ["link-broken", "name-not-utf8"]
    "\n".join(map(str, listing.findings)).encode()


def test_sets_have_their_own_roles_repeats_and_rules(tmp_path: Path) -> None:
    for name in ("mine", "class", "held"):
        (
            put(tmp_path / name / "a.png"),
            put(tmp_path / name / "a.cap" if name == "class" else tmp_path / name / "a.txt", "x, y"),
        )
    sets = (
        SetSection(images=str(tmp_path / "mine"), repeats=3, loss_weight=0.5, shuffle_tags=True, keep_tokens=2),
        SetSection(images=str(tmp_path / "class"), role="regularisation", caption_extension="cap"),
        SetSection(images=str(tmp_path / "held"), role="validation", trigger="blup", caption_prefix="p,"),
    )
    data = DataSection(sets=sets, trigger="zorb", caption_suffix="s", wildcards=True)
    listing = find_sources(data)
    assert listing.findings == ()
    mine, reg, held = listing.sources
    assert (mine.role, mine.repeats, mine.loss_weight, mine.set_number) == ("train", 3, 0.5, 0)
    assert (mine.rules.trigger, mine.rules.shuffle_tags, mine.rules.keep_tokens, mine.rules.wildcards) == (
        "zorb",
        True,
        2,
        True,
    )
    assert (reg.role, reg.rules.trigger, reg.rules.shuffle_tags) == ("regularisation", "", False)
    assert reg.rules.plain(reg.captions) == "x, y s"
    assert (held.role, held.rules.trigger, held.set_number) == ("validation", "blup", 2)
    assert held.rules.plain(held.captions) == "p, blup, x, y s"


def test_a_image_in_two_sets(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.png"), put(tmp_path / "in" / "a.txt", "a")

    def shared(role: Any) -> list[tuple[str, str, str]]:
        sets = (SetSection(images=str(tmp_path)), SetSection(images=str(tmp_path / "in"), role=role))
        return codes(find_sources(DataSection(sets=sets, trigger="zorb")))

    assert shared("train") == [("image-shared", "warning", "a.png")]
    assert shared("validation") == [("image-shared", "error", "a.png")]


def test_stems_collide_only_where_a_caption_file_would_be_shared(tmp_path: Path) -> None:
    images_in(tmp_path, "a.png", "a.jpg", "in/a.png")
    put(tmp_path / "a.txt", "a"), put(tmp_path / "in" / "a.txt", "a")
    assert codes(listed(tmp_path)) == [("stem-collision", "error", "a.jpg")]
    (tmp_path / "a.txt").unlink()
    put(tmp_path / "metadata.csv", "file_name,text\na.png,x\na.jpg,y\n")
    assert texts(found(tmp_path)) == {"a.jpg": ("y",), "a.png": ("x",), "in/a.png": ("a",)}


# Masks


def test_masks_belong_to_their_images(tmp_path: Path) -> None:
    images_in(
        tmp_path / "in", "a.png", "b.jpg", "c.png", "sub/d.png", "mask/a.png", "b-masklabel.png", "sub/mask/d.png"
    )
    for name in ("a", "b", "c", "sub/d"):
        put(tmp_path / "in" / f"{name}.txt", "x")
    folder = tmp_path / "in"
    listing = listed(folder, mask="files")
    assert {source.name: source.mask for source in listing.sources} == {
        "a.png": folder / "mask/a.png",
        "b.jpg": folder / "b-masklabel.png",
        "c.png": None,
        "sub/d.png": folder / "sub/mask/d.png",
    }
    assert codes(listing) == [("mask-missing", "warning", "c.png")]
    put(folder / "mask" / "loose.png")
    assert ("mask-unused", "warning", "loose.png") in codes(listed(folder, mask="files"))
    unused = listed(folder)
    assert codes(unused) == [("mask-unused", "warning", "in"), ("mask-unused", "warning", "sub")]
    assert "3 masks are not used" in str(unused.findings[0])
    assert {source.mask for source in unused.sources} == {None}


def test_masks_in_a_folder_of_their_own(tmp_path: Path) -> None:
    images_in(tmp_path, "in/a.png", "other/a.png", "in/b-masklabel.png")
    put(tmp_path / "in" / "a.txt", "x"), put(tmp_path / "in" / "b-masklabel.txt", "an image of a mask label")

    def masks(where: str) -> Listing:
        section = SetSection(images=str(tmp_path / "in"), masks=str(tmp_path / where))
        return find_sources(DataSection(sets=(section,), mask="files", trigger="zorb"))

    assert {s.name: s.mask for s in masks("other").sources} == {
        "a.png": tmp_path / "other/a.png",
        "b-masklabel.png": None,
    }
    assert [code for code, *_ in codes(masks("none"))] == ["folder-missing", "mask-missing"]
    assert ("mask-missing", "error", "") in codes(masks("none"))
