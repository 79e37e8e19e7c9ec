"""Folders, tables and kohya's dataset configuration: what is found, with which captions, and every fault at once."""

from __future__ import annotations

import csv
import json
import os
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdlora.config import Config, DataSection, OutputSection, SetSection, TrainSection
from sdlora.data.findings import Finding, raise_errors
from sdlora.data.items import Item, dataset_digest, load_items
from sdlora.data.kohya_toml import KEYS
from sdlora.data.sources import Listing, Source, find_sources, resolve_config, resolve_data
from sdlora.data.tables import read_table
from sdlora.errors import ConfigError, DataError
from sdlora.training.plan import plan_run
from tests.conftest import write_pictures

GREY = Image.new("RGB", (8, 8), "grey")


def listed(folder: Path | str, **settings: Any) -> Listing:
    return find_sources(DataSection(**{"images": str(folder), "trigger": "zorb", **settings}))


def found(folder: Path | str, **settings: Any) -> tuple[Source, ...]:
    """Of a folder without a fault."""
    listing = listed(folder, **settings)
    assert listing.findings == ()
    return listing.sources


def codes(listing: Listing) -> list[tuple[str, str, str]]:
    return sorted((one.code, one.severity, Path(one.file or "").name) for one in listing.findings)


def loaded(listing: Listing, **settings: Any) -> tuple[tuple[Item, ...], tuple[Finding, ...]]:
    return load_items(listing, **{"background": "#ffffff", "mask": "none", **settings})


def put(file: Path, content: str | bytes = "") -> Path:
    """A picture where ``file`` is named as one and nothing is given, else the given content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix.lower() in (".png", ".jpg", ".webp") and not content:
        GREY.save(file)
    else:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def texts(sources: tuple[Source, ...]) -> dict[str, tuple[str, ...]]:
    return {source.name: source.captions for source in sources}


# Folders


def test_pairs_pictures_with_captions(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "ü 空 a b", 3)
    sources = found(folder)
    assert texts(sources) == {f"{i}.png": (f"a thing of kind {i}",) for i in range(3)}
    assert [source.file for source in sources] == [folder / f"{i}.png" for i in range(3)]
    assert [source.caption_file for source in sources] == [folder / f"{i}.txt" for i in range(3)]
    assert sources[0].rules.plain(sources[0].captions) == "zorb, a thing of kind 0"
    assert {(s.role, s.repeats, s.loss_weight, s.mask, s.set_number) for s in sources} == {("train", 1, 1.0, None, 0)}


def test_every_fault_in_one_report(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 12)
    (folder / "0.png").write_bytes(b"")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "2.png").write_text("not a picture")
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text("word " * 300)
    (folder / "5.txt").write_bytes("Bär".encode("latin-1"))
    (folder / "6.txt").write_text("  \n ")
    (folder / "7.txt").rename(folder / "7.caption")
    Image.new("RGB", (64, 64)).save(folder / "8.jpg")
    (folder / "9.txt").write_bytes(b"x" * 100_000)
    listing = listed(folder)
    _, faults = loaded(listing)
    with pytest.raises(DataError) as caught:
        raise_errors((*listing.findings, *faults))
    problems = dict.fromkeys(caught.value.problems)
    expected = {
        "0.png": "empty file",
        "1.png": "picture",
        "2.png": "not a picture",
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
    assert "no picture among its 1 files; put pictures there whose names end in .avif .bmp" in str(
        listed(empty).findings[0]
    )


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
    assert "trained on 'house'" in str(next(one for one in listing.findings if one.code == "caption-missing"))


@pytest.mark.parametrize("extension", [".caption", "caption", "CAPTION"])
def test_the_extension_of_captions_may_have_its_dot_or_not(tmp_path: Path, extension: str) -> None:
    put(tmp_path / "a.png"), put(tmp_path / "a.caption", "one")
    put(tmp_path / "b.c.PNG", (tmp_path / "a.png").read_bytes()), put(tmp_path / "b.c.Caption", "two")
    assert texts(found(tmp_path, caption_extension=extension)) == {"a.png": ("one",), "b.c.PNG": ("two",)}


def test_captions_of_another_extension_are_counted(tmp_path: Path) -> None:
    for i in range(24):
        put(tmp_path / f"{i}.png"), put(tmp_path / f"{i}.caption", "x")
    listing = listed(tmp_path)
    assert [str(one) for one in listing.findings] == [
        f'{tmp_path}: found 24 .caption files; you asked for .txt; set data.caption_extension = ".caption"'
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
        ("picture-format", "warning", "e.psd"),
    ]
    told = "\n".join(map(str, listing.findings))
    assert "a.png: no caption; write a.txt beside it" in told
    assert "b.png: no caption; rename b.png.txt as b.txt" in told
    assert "C.png: no caption; rename c.txt as C.txt" in told
    allowed = listed(tmp_path, allow_missing_captions=True)
    assert {one.severity for one in allowed.findings} == {"warning"}
    assert texts(allowed.sources)["a.png"] == ()


def test_a_folder_without_any_caption_is_told_once(tmp_path: Path) -> None:
    for i in range(5):
        put(tmp_path / f"{i}.png")
    listing = listed(tmp_path)
    assert codes(listing) == [("caption-missing", "error", tmp_path.name)]
    assert "none of its 5 pictures has a caption; write 0.txt and so on" in str(listing.findings[0])


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


# Tables


def write_csv(file: Path, rows: list[list[str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def pictures_in(folder: Path, *names: str) -> Path:
    for name in names:
        put(folder / name)
    return folder


def test_tables_of_hugging_faces_imagefolder(tmp_path: Path) -> None:
    lines = [
        {"file_name": "a.png", "text": "a fox\nrunning"},
        {"file_name": "sub/b ü.png", "caption": ["one", "two"], "weight": 0.5},
        {"file_name": "c.png", "text": None, "prompt": "c", "loss_weight": 2, "objects": {"id": [1]}},
    ]
    jsonl = pictures_in(tmp_path / "jsonl", "a.png", "sub/b ü.png", "c.png")
    put(jsonl / "metadata.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    sources = {source.name: source for source in found(jsonl, caption_lines="draw")}
    assert {name: (one.captions, one.loss_weight) for name, one in sources.items()} == {
        "a.png": (("a fox", "running"), 1.0),
        "sub/b ü.png": (("one", "two"), 0.5),
        "c.png": (("c",), 2.0),
    }
    assert {one.caption_file for one in sources.values()} == {jsonl / "metadata.jsonl"}
    table = pictures_in(tmp_path / "csv", "a.png", "b.png", "c.png")
    put(table / "c.txt", "from its file")
    rows = [
        ["file_name", "text", "weight"],
        ["a.png", 'a "fox", red\nrunning', ""],
        ["b.png", "b", "0"],
        ["c.png", "", "3"],
    ]
    write_csv(table / "metadata.csv", rows)
    assert [(one.captions, one.loss_weight) for one in found(table)] == [
        (('a "fox", red running',), 1.0),
        (("b",), 0.0),
        (("from its file",), 3.0),
    ]


def test_tables_of_kohyas_trainer(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path, "a.png", "b.png", "sub/c.webp", "d.png")
    meta = {
        "a": {"caption": "a fox", "tags": "red, 1boy"},
        str(folder / "b.png"): {"tags": "blue"},
        "sub\\c.webp": {"caption": "c", "image_size": [8, 8]},
        "d.png": {"caption": "one\ntwo", "tags": "x,\ny"},
    }
    put(folder / "meta_clean.json", json.dumps(meta))
    assert texts(found(folder)) == {
        "a.png": ("a fox, red, 1boy",),
        "b.png": ("blue",),
        "d.png": ("one two, x, y",),
        "sub/c.webp": ("c",),
    }
    assert texts(found(folder, caption_lines="draw"))["d.png"] == ("one, x, y", "two, x, y")


def test_every_broken_row_is_told_with_its_line(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path, "a.png", "b.png", "c.png", "d.png")
    lines = [
        '{"file_name": "a.png", "text": "a"}',
        '{"file_name": "b.png", "text": "b"',
        "[1]",
        '{"text": "nameless"}',
        '{"file_name": "b.png", "text": 5}',
        '{"file_name": "c.png", "text": "c", "weight": -1}',
        '{"file_name": "none.png", "text": "x"}',
        '{"file_name": "a.png", "text": "again"}',
        '{"file_name": "d.png", "text": "\\ud800"}',
        '{"file_name": 5}',
        '{"file_name": "d.png", "text": "d", "weight": NaN}',
    ]
    put(folder / "metadata.jsonl", "\n".join(lines))
    for name in "bcd":
        put(folder / f"{name}.txt", name)
    listing = listed(folder)
    told = [str(one).partition(": ")[2] for one in listing.findings]
    assert {one.severity for one in listing.findings} == {"error"}
    for number, what in (
        (2, "is not JSON"), (3, "is no JSON object"), (4, "has no file_name"), (5, "has a caption that is no text: 5"),
        (6, "has a weight that is no number from 0: -1"), (7, "names 'none.png', which is no picture of this set"),
        (8, "names 'a.png' again, after line 1"), (9, "holds half of a character"), (10, "has file_name = 5"),
        (11, "has a weight that is no number from 0: nan"),
    ):  # fmt: skip
        assert [line for line in told if line.startswith(f"line {number} {what}")], (number, what, told)
    assert len(told) == 10


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("metadata.jsonl", b"\xff\xfe", "table-not-utf8", "not UTF-8 text (byte 0)"),
        ("metadata.jsonl", b"\n", "table-empty", "no row"),
        ("metadata.csv", b"", "table-empty", "no row"),
        ("metadata.csv", b"name,text\na.png,x\n", "table-columns", "no column file_name among name, text"),
        ("metadata.csv", b"file_name,text\na.png,x,y\n", "table-broken", "line 2 has not 2 fields"),
        ("metadata.csv", b"file_name,text\na.png\n", "table-broken", "line 2 has not 2 fields"),
        ("metadata.csv", b'file_name,text\na.png,"x\n', "table-broken", "line 2 is not CSV"),
        ("meta_x.json", b"{\n]", "table-broken", "line 2 is not JSON"),
        ("meta_x.json", b"[1]", "table-broken", "this table is no JSON object"),
        ("meta_x.json", b'{"a": "fox"}', "table-broken", "entry 'a' is no JSON object"),
        ("meta_x.json", b'{"a": {"tags": "x"}, "a": {"tags": "y"}}', "row-duplicate", "the key 'a' stands twice"),
        ("meta_x.json", b'{"a": {"tags": "x"}, "a.png": {"tags": "y"}}', "row-duplicate", "names 'a.png' again"),
        ("meta_x.json", b"[" * 100_000, "table-broken", "this table is not JSON"),
        ("meta_x.json", b'{"a": {"loss_weight": 1' + b"0" * 5000 + b"}}", "table-broken", "this table is not JSON"),
    ],
)
def test_broken_tables(tmp_path: Path, name: str, content: bytes, code: str, message: str) -> None:
    put(tmp_path / "a.png"), put(tmp_path / "a.txt", "a"), put(tmp_path / name, content)
    told = [one for one in listed(tmp_path).findings if one.code != "caption-twice"]
    assert [(one.code, one.severity) for one in told] == [(code, "error")]
    assert f"{name}: " in str(told[0])
    assert message in str(told[0])


@given(st.sampled_from([".jsonl", ".csv", ".json"]), st.binary(max_size=80) | st.text('{}[]",:\n a1', max_size=80))
def test_any_bytes_are_a_table_or_findings(extension: str, content: bytes | str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = read_table(put(Path(folder) / f"t{extension}", content or b""))
    assert table.rows or table.findings
    assert all(isinstance(row.name, str) and row.weight >= 0 for row in table.rows)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["caption", "tags", "weight"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_any_json_is_a_table_or_findings(entries: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = read_table(put(Path(folder) / "meta_t.json", json.dumps(entries)))
        lines = "\n".join(json.dumps({"file_name": key, "text": value}) for key, value in entries.items())
        others = read_table(put(Path(folder) / "t.jsonl", lines))
    for one in (table, others):
        assert len(one.rows) + len({finding.message for finding in one.findings}) >= bool(entries)
        json.dumps([row.name + (row.caption or "") + row.tags for row in one.rows], ensure_ascii=False).encode()


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\\0\r\n", exclude_categories=["Cs", "Cc"]), max_size=8
)


@given(st.lists(st.tuples(NAMES.filter(str.strip), st.text(st.characters(codec="utf-8"), max_size=20)), max_size=5))
def test_what_a_csv_table_says_comes_back(rows: list[tuple[str, str]]) -> None:
    rows = [(name.strip(), text.replace("\0", "").replace("\r", "")) for name, text in rows]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.csv"
        write_csv(file, [["file_name", "text"], *map(list, rows)])
        table = read_table(file)
    assert [(row.name, row.caption or "") for row in table.rows] == rows


def test_a_table_and_a_caption_file_or_two_tables(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path, "a.png", "b.png")
    put(folder / "a.txt", "from its file")
    put(folder / "meta_a.json", '{"a": {"caption": "from the table"}, "b": {"caption": "b"}}')
    listing = listed(folder)
    assert codes(listing) == [("caption-twice", "warning", "a.txt")]
    assert texts(listing.sources)["a.png"] == ("from the table",)
    put(folder / "metadata.csv", "file_name\na.png\n")
    assert ("table-several", "error", tmp_path.name) in codes(listed(folder))
    assert texts(listed(folder, metadata=str(folder / "meta_a.json")).sources)["b.png"] == ("b",)


def test_a_named_table_says_which_pictures_are_used(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "in", "a.png", "b.png", "c.png")
    other = put(tmp_path / "out" / "d.png")
    table = put(tmp_path / "lists" / "mine.json", json.dumps({"a": {"caption": "a"}, str(other): {"caption": "d"}}))
    listing = listed(folder, metadata=str(table))
    assert texts(listing.sources) == {"a.png": ("a",), "d.png": ("d",)}
    assert codes(listing) == [("picture-unused", "warning", "in")]
    assert "2 of its 4 pictures are not in" in str(listing.findings[0])
    beside = put(tmp_path / "out" / "rows.jsonl", '{"file_name": "d.png", "text": "d"}')
    assert texts(listed(folder, metadata=str(beside)).sources) == {"d.png": ("d",)}
    assert "table-unreadable" in [code for code, *_ in codes(listed(folder, metadata=str(tmp_path / "none.csv")))]
    assert "table-unreadable" in [code for code, *_ in codes(listed(folder, metadata=str(folder / "a.png")))]


# Sets


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


def test_a_picture_in_two_sets(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.png"), put(tmp_path / "in" / "a.txt", "a")

    def shared(role: Any) -> list[tuple[str, str, str]]:
        sets = (SetSection(images=str(tmp_path)), SetSection(images=str(tmp_path / "in"), role=role))
        return codes(find_sources(DataSection(sets=sets, trigger="zorb")))

    assert shared("train") == [("picture-shared", "warning", "a.png")]
    assert shared("validation") == [("picture-shared", "error", "a.png")]


def test_stems_collide_only_where_a_caption_file_would_be_shared(tmp_path: Path) -> None:
    pictures_in(tmp_path, "a.png", "a.jpg", "in/a.png")
    put(tmp_path / "a.txt", "a"), put(tmp_path / "in" / "a.txt", "a")
    assert codes(listed(tmp_path)) == [("stem-collision", "error", "a.jpg")]
    (tmp_path / "a.txt").unlink()
    put(tmp_path / "metadata.csv", "file_name,text\na.png,x\na.jpg,y\n")
    assert texts(found(tmp_path)) == {"a.jpg": ("y",), "a.png": ("x",), "in/a.png": ("a",)}


# Masks


def test_masks_belong_to_their_pictures(tmp_path: Path) -> None:
    pictures_in(
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
    pictures_in(tmp_path, "in/a.png", "other/a.png", "in/b-masklabel.png")
    put(tmp_path / "in" / "a.txt", "x"), put(tmp_path / "in" / "b-masklabel.txt", "a picture of a mask label")

    def masks(where: str) -> Listing:
        one = SetSection(images=str(tmp_path / "in"), masks=str(tmp_path / where))
        return find_sources(DataSection(sets=(one,), mask="files", trigger="zorb"))

    assert {s.name: s.mask for s in masks("other").sources} == {
        "a.png": tmp_path / "other/a.png",
        "b-masklabel.png": None,
    }
    assert [code for code, *_ in codes(masks("none"))] == ["folder-missing", "mask-missing"]
    assert ("mask-missing", "error", "") in codes(masks("none"))


# Items


def test_items_are_decoded_upright_and_in_order(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 9, sizes=((40, 20), (30, 60)))
    turned = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "4.png", exif=exif)
    Image.new("RGBA", (5, 7), (255, 0, 0, 0)).save(folder / "5.png")
    items, findings = loaded(listed(folder))
    assert findings == ()
    assert [item.source.name for item in items] == [f"{i}.png" for i in range(9)]
    sizes = [(40, 20), (30, 60)] * 5
    sizes[4:6] = [(20, 40), (5, 7)]
    assert [(item.width, item.height) for item in items] == sizes[:9]
    assert [item.has_alpha for item in items] == [i == 5 for i in range(9)]


def test_a_picture_that_cannot_be_decoded_is_a_finding_and_no_item(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 4)
    put(folder / "2.png", (folder / "2.png").read_bytes()[:70])
    put(folder / "3.png", "text")
    items, findings = loaded(listed(folder))
    assert [item.source.name for item in items] == ["0.png", "1.png"]
    assert [Path(one.file or "").name for one in findings] == ["2.png", "3.png"]
    assert {one.severity for one in findings} == {"error"}


class Counted:
    """Progress that adds up."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def start(self, task: str, total: int, done: int = 0) -> None:
        self.total = total

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


def test_a_picture_in_two_sets_is_decoded_once(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 3)
    one = SetSection(images=str(folder))
    listing = find_sources(DataSection(sets=(one, one), trigger="zorb"))
    progress = Counted()
    items, _ = load_items(listing, background="#ffffff", mask="none", progress=progress)
    assert (progress.total, progress.done) == (3, 3)
    assert [item.source.set_number for item in items] == [0, 0, 0, 1, 1, 1]
    assert items[0].digest == items[3].digest


def digests(folder: Path, **settings: Any) -> tuple[str, ...]:
    mask = settings.get("mask", "none")
    return tuple(item.digest for item in loaded(listed(folder, **settings), mask=mask)[0])


def test_digests_of_pictures_cover_what_is_shown_and_what_is_weighted(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(put(tmp_path / "a.png", b"x")), put(tmp_path / "a.txt", "a")
    put(tmp_path / "mask" / "a.png")
    plain, weighted, masked = digests(tmp_path), digests(tmp_path, mask="alpha"), digests(tmp_path, mask="files")
    assert len({plain, weighted, masked}) == 3
    Image.new("RGBA", (8, 8), (0, 0, 255, 0)).save(tmp_path / "a.png")
    assert digests(tmp_path) == plain, "colour that nothing shows"
    listing = listed(tmp_path)
    assert load_items(listing, background="#000000", mask="none")[0][0].digest != plain[0]
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    assert digests(tmp_path) == plain, "what transparency on white looks like"
    assert digests(tmp_path, mask="alpha") != weighted
    Image.new("L", (8, 8), 9).save(tmp_path / "mask" / "a.png")
    assert digests(tmp_path, mask="files") != masked


def test_the_digest_of_a_dataset_tells_apart_whatever_alters_training(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 3)
    one = SetSection(images=str(folder))

    def digest(one: SetSection = one, **settings: Any) -> str:
        return dataset_digest(loaded(find_sources(DataSection(**{"sets": (one,), "trigger": "zorb", **settings})))[0])

    before = digest()
    assert digest() == before
    changes: list[Callable[[], str]] = [
        lambda: digest(trigger="blup"),
        lambda: digest(one.model_copy(update={"repeats": 2})),
        lambda: digest(one.model_copy(update={"loss_weight": 0.5})),
        lambda: digest(one.model_copy(update={"keep_tokens": 1})),
        lambda: digest(caption_replace=(("thing", "being"),)),
        lambda: digest(tag_dropout=0.5),
    ]
    seen = {before, *(change() for change in changes)}
    (folder / "1.txt").write_text("something else")
    seen.add(digest())
    pixels = np.asarray(Image.open(folder / "2.png")).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "2.png")
    seen.add(digest())
    (folder / "2.png").rename(folder / "9.png"), (folder / "2.txt").rename(folder / "9.txt")
    seen.add(digest())
    assert len(seen) == 1 + len(changes) + 3
    last = digest()
    folder.rename(tmp_path / "moved")
    assert digest(SetSection(images=str(tmp_path / "moved"))) == last, "where the folder lies"


# kohya's dataset configuration


def resolved(tmp_path: Path, toml: str, **data: Any) -> Config:
    file = put(tmp_path / "dataset.toml", toml)
    train = TrainSection(**data.pop("train", {}))
    section = DataSection(**{"dataset_config": str(file), "trigger": "zorb", **data})
    return resolve_config(Config(data=section, train=train, output=OutputSection(path="x.safetensors")))


def refused(tmp_path: Path, toml: str, **data: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, toml, **data)
    return [problem.replace(str(tmp_path / "dataset.toml"), "T") for problem in caught.value.problems]


EXAMPLE = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
flip_aug = true
color_aug = false
cache_info = true

# This is a DreamBooth-style dataset
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'
  # This subset uses keep_tokens = 2 (the value of the parent datasets)

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'fuga boy'
  num_repeats = 10
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'
  keep_tokens = 1

[[datasets]]
resolution = [512, 512]
batch_size = 4
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024

  [[datasets.subsets]]
  image_dir = 'piyo'
  metadata_file = 'piyo/piyo_md.json'
  # This subset uses keep_tokens = 1 (the value of [general])
"""
"""After the example of kohya's own documentation, docs/config_README-en.md, with one resolution."""


def test_the_example_of_kohyas_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(tmp_path, EXAMPLE)
    data = config.data
    assert [(one.images, one.role, one.class_prompt, one.repeats, one.keep_tokens) for one in data.sets] == [
        ("hoge", "train", "hoge girl", 1, 2),
        ("fuga", "train", "fuga boy", 10, 3),
        ("reg", "regularisation", "human", 1, 1),
        ("piyo", "train", None, 1, 1),
    ]
    assert (data.resolution, data.min_bucket_reso, data.max_bucket_reso) == (512, 256, 1024)
    assert {one.flip for one in data.sets} == {True}
    assert config.train.batch_size == 4
    assert data.dataset_config is None
    assert resolve_config(config) == config

    monkeypatch.chdir(tmp_path)
    pictures_in(
        tmp_path, "hoge/a.png", "hoge/deep/never.png", "fuga/5_x/never.png", "fuga/b.png", "reg/c.png", "piyo/d.png"
    )
    put(tmp_path / "hoge" / "a.txt", "first line\nsecond line")
    put(tmp_path / "piyo" / "piyo_md.json", '{"d": {"caption": "a bird", "tags": "1bird, sky"}}')
    listing = find_sources(data)
    assert [(s.file.name, s.captions, s.repeats, s.rules.plain(s.captions)) for s in listing.sources] == [
        ("a.png", ("first line",), 1, "zorb, first line"),
        ("b.png", ("fuga boy",), 10, "zorb, fuga boy"),
        ("c.png", ("human",), 1, "human"),
        ("d.png", ("a bird, 1bird, sky",), 1, "zorb, a bird, 1bird, sky"),
    ]
    assert codes(listing) == [("caption-lines", "warning", "a.txt")]
    wild = resolved(tmp_path, EXAMPLE.replace("cache_info = true", "enable_wildcard = true"))
    assert find_sources(wild.data).sources[0].captions == ("first line", "second line")
    assert find_sources(wild.data).sources[0].rules.wildcards


LEVELS = ("general", "dataset", "subset")


@given(st.fixed_dictionaries({level: st.none() | st.integers(0, 9) for level in LEVELS}), st.integers(0, 9))
def test_subset_goes_before_dataset_before_general_before_data(values: dict[str, int | None], own: int) -> None:
    lines = {level: f"keep_tokens = {value}" if value is not None else "" for level, value in values.items()}
    toml = (
        f'[general]\n{lines["general"]}\n[[datasets]]\n{lines["dataset"]}\n[[datasets.subsets]]\nimage_dir = "a"\n'
        + lines["subset"]
    )
    expected = next((values[level] for level in reversed(LEVELS) if values[level] is not None), own)
    with tempfile.TemporaryDirectory() as folder:
        config = resolved(Path(folder), toml, keep_tokens=own)
        put(Path(folder) / "a.png"), put(Path(folder) / "a.txt", "x")
        data = config.data.model_copy(update={"sets": (config.data.sets[0].model_copy(update={"images": folder}),)})
        assert find_sources(data).sources[0].rules.keep_tokens == expected


REFUSED = {
    "color_aug": "true", "face_crop_aug_range": "[1.0, 3.0]", "caption_separator": '"."', "secondary_separator": '";;;"',
    "keep_tokens_separator": '"|||"', "token_warmup_min": "2", "token_warmup_step": "0.5",
    "caption_dropout_every_n_epochs": "3", "custom_attributes": "{a = 1}", "resize_interpolation": '"area"',
    "network_multiplier": "0.5", "validation_split": "0.1", "validation_seed": "7", "skip_image_resolution": "768",
}  # fmt: skip
HARMLESS = {
    "color_aug": "false", "caption_separator": '","', "secondary_separator": '""', "keep_tokens_separator": '""',
    "token_warmup_min": "1", "token_warmup_step": "0", "caption_dropout_every_n_epochs": "0", "custom_attributes": "{}",
    "resize_interpolation": '"lanczos"', "network_multiplier": "1.0", "validation_split": "0.0", "validation_seed": "0",
    "cache_info": "true",
}  # fmt: skip


def test_what_cannot_be_followed_is_named_key_by_key(tmp_path: Path) -> None:
    body = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n'
    general = "[general]\n" + "".join(f"{key} = {value}\n" for key, value in REFUSED.items())
    problems = refused(tmp_path, general + body)
    assert len(problems) == len(REFUSED)
    for number, key in enumerate(REFUSED, 2):
        assert [line for line in problems if line.startswith(f"T:{number}: {key} = ") and "cannot be followed" in line]
    harmless = "[general]\n" + "".join(f"{key} = {value}\n" for key, value in HARMLESS.items())
    assert resolved(tmp_path, harmless + body).data.sets == resolved(tmp_path, body).data.sets
    assert {key for key, known in KEYS.items() if known.harmless is not None} == {*REFUSED, *HARMLESS}


def test_faults_of_a_dataset_configuration_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    toml = (
        "[general]\nbatchsize = 3\nimage_dir = 'x'\n[[datasets]]\nresolution = [768, 512]\nkeep_tokens = true\n"
        "[[datasets.subsets]]\nimage_dir = 'a'\nnum_repeats = 0\n[[datasets.subsets]]\nbatch_size = 2\n[other]\n"
    )
    assert sorted(refused(tmp_path, toml)) == [
        "T:10: image_dir is missing",
        "T:11: batch_size cannot stand in [[datasets.subsets]], only in [general] or [[datasets]]",
        "T:12: unknown key other; did you mean general?",
        "T:2: unknown key batchsize; did you mean batch_size?",
        "T:3: image_dir cannot stand in [general], only in [[datasets.subsets]]",
        "T:5: resolution = [768, 512] is no square; name the side of one, whose area the buckets have",
        "T:6: keep_tokens = True: expected a whole number",
        "T:9: num_repeats = 0: input should be greater than or equal to 1",
    ]


SUBSETS = "[[datasets]]\n{0}\n[[datasets.subsets]]\nimage_dir = 'a'\n{1}\n[[datasets.subsets]]\nimage_dir = 'b'\n{2}\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("resolution = [768, 512]", "", ""), "T:2: resolution = [768, 512] is no square"),
        (
            ("", "caption_dropout_rate = 0.1", "caption_dropout_rate = 0.2"),
            "T:8: caption_dropout_rate is 0.1 and 0.2 in different subsets, but is one for the whole run",
        ),
        (("", "alpha_mask = true", ""), "alpha_mask is alpha and none"),
        (("", "alpha_mask = true", "conditioning_data_dir = 'c'"), "alpha_mask is alpha and files"),
        (
            ("resolution = 256\nmin_bucket_reso = 512", "", ""),
            "min_bucket_reso = 512 is more than data.resolution = 256",
        ),
        (("resolution = 9999", "", ""), "T:2: resolution = 9999: expected pixels from 64 to 4096"),
        (("resolution = [[1], [1]]", "", ""), "T:2: resolution = [1]: expected pixels from 64 to 4096"),
        (("resolution = ['a', 'b', 'c']", "", ""), "T:2: resolution = ['a', 'b', 'c'] is no square"),
        (("", "", "image_dir = 'a'"), "not valid TOML"),
    ],
)
def test_what_is_one_for_a_run_must_be_told_alike(tmp_path: Path, values: tuple[str, ...], message: str) -> None:
    assert any(message in line for line in refused(tmp_path, SUBSETS.format(*values)))


def test_settings_for_the_whole_run_reach_their_sections(tmp_path: Path) -> None:
    common = (
        "batch_size = 3\nenable_bucket = false\nbucket_reso_steps = 32\nbucket_no_upscale = true\nrandom_crop = true\n"
        "caption_dropout_rate = 0.25\nflip_aug = true"
    )
    config = resolved(
        tmp_path, SUBSETS.format(common, "conditioning_data_dir = 'm'\ncaption_tag_dropout_rate = 0.5", "")
    )
    data = config.data
    assert (config.train.batch_size, config.train.caption_dropout) == (3, 0.25)
    assert (data.enable_bucket, data.bucket_reso_steps, data.bucket_no_upscale) == (False, 32, True)
    assert data.mask == "files"
    assert [(one.masks, one.tag_dropout, one.subfolders, one.crop, one.flip) for one in data.sets] == [
        ("m", 0.5, False, "random", True),
        (None, None, False, "random", True),
    ]
    alpha = resolved(tmp_path, SUBSETS.format("", "alpha_mask = true", "alpha_mask = true"))
    assert alpha.data.mask == "alpha"
    assert alpha.train == TrainSection()
    assert resolve_data(DataSection(dataset_config=str(tmp_path / "dataset.toml"), trigger="zorb")) == alpha.data


def test_a_run_is_planned_by_what_the_dataset_configuration_says(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 5)
    toml = (
        f"[[datasets]]\nbatch_size = 2\nresolution = 64\ncaption_extension = '.txt'\ncaption_dropout_rate = 0.25\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\nnum_repeats = 3\n"
    )
    file = put(tmp_path / "dataset.toml", toml)
    data = DataSection(dataset_config=str(file), trigger="zorb")
    plan = plan_run(Config(data=data, output=OutputSection(path=str(tmp_path / "x.safetensors"))))
    assert plan.config.train.caption_dropout == 0.25
    assert plan.identity.config["train.batch_size"] == "2"
    assert {len(batch) for batch in plan.batches.epoch(0)} <= {1, 2}
    assert sum(len(batch) for batch in plan.batches.epoch(0)) == 15


def test_datasets_may_have_resolutions_flips_and_crops_of_their_own(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "set", "a.png")
    put(folder / "a.txt", "a")
    one = "[[datasets]]\n{0}\n[[datasets.subsets]]\nimage_dir = '{1}'\n{2}\n"
    toml = one.format("resolution = 512", folder, "flip_aug = true") + one.format("resolution = [768, 768]", folder, "")
    config = resolved(tmp_path, toml + one.format("", folder, "random_crop = true"), resolution=640, crop="salient")
    assert config.data.sides == (512, 768, 640)
    assert refused(tmp_path, toml, resolution=640) == ["T: every dataset has its resolution, so remove data.resolution"]
    listing = find_sources(config.data)
    assert [(source.resolution, source.flip, source.crop) for source in listing.sources] == [
        ((512,), True, "salient"),
        ((768,), False, "salient"),
        ((640,), False, "random"),
    ]
    assert listing.findings == (), "the same picture at different resolutions is meant"
    problems = refused(tmp_path, toml + one.format("", folder, ""))
    assert problems == ["T: data.resolution is missing: some sets have one of their own, and the others need this"]
    assert codes(find_sources(resolved(tmp_path, toml + one.format("resolution = 512", folder, "")).data)) == [
        ("picture-shared", "warning", "a.png")
    ]
    twice = one.format("", "a", "") + "[[datasets.subsets]]\nimage_dir = 'a'\n"
    assert refused(tmp_path, twice) == ["T:6: a is in this dataset already; remove one of them"]


def test_a_dataset_configuration_and_the_run_must_not_contradict(tmp_path: Path) -> None:
    toml = SUBSETS.format("resolution = 512\nbatch_size = 4", "", "")
    problems = refused(tmp_path, toml, resolution=768, train={"batch_size": 2})
    assert problems == [
        "T: asks for data.resolution = 512, but the configuration of the run for 768; keep one of them",
        "T: asks for train.batch_size = 4, but the configuration of the run for 2; keep one of them",
    ]
    agreed = resolved(tmp_path, toml, resolution=512, train={"batch_size": 4, "steps": 9})
    assert (agreed.train.batch_size, agreed.train.steps) == (4, 9)


def test_files_that_are_no_dataset_configuration(tmp_path: Path) -> None:
    assert refused(tmp_path, "") == ["T: no [[datasets.subsets]]; write one for each folder of pictures"]
    assert "expected tables [general] and [[datasets]]" in refused(tmp_path, "datasets = 3")[0]
    assert "not valid TOML" in refused(tmp_path, "[x")[0]
    with pytest.raises(ConfigError, match="no such configuration file"):
        find_sources(DataSection(dataset_config=str(tmp_path / "none.toml"), trigger="zorb"))
    file = put(tmp_path / "d.json", json.dumps({"datasets": [{"subsets": [{"image_dir": "a"}]}]}))
    assert resolve_data(DataSection(dataset_config=str(file), trigger="zorb")).sets[0].images == "a"
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        resolve_data(DataSection(dataset_config=str(put(tmp_path / "e.json", "{")), trigger="zorb"))


@given(st.text("[]datsubege.=_{}\"'1\n ", max_size=100))
def test_any_text_is_a_dataset_configuration_or_a_config_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            assert resolved(Path(folder), text + EXAMPLE).data.sets
        except ConfigError as error:
            assert error.problems
