"""Tables of captions of other tools, whole and broken."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora.data.tables import read_table
from tests.sets import codes, found, images_in, listed, put, texts, write_csv


def test_tables_of_hugging_faces_imagefolder(tmp_path: Path) -> None:
    lines = [
        {"file_name": "a.png", "text": "a fox\nrunning"},
        {"file_name": "sub/b ü.png", "caption": ["one", "two"], "weight": 0.5},
        {"file_name": "c.png", "text": None, "prompt": "c", "loss_weight": 2, "objects": {"id": [1]}},
    ]
    jsonl = images_in(tmp_path / "jsonl", "a.png", "sub/b ü.png", "c.png")
    put(jsonl / "metadata.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    sources = {source.name: source for source in found(jsonl, caption_lines="draw")}
    assert {name: (source.captions, source.loss_weight) for name, source in sources.items()} == {
        "a.png": (("a fox", "running"), 1.0),
        "sub/b ü.png": (("one", "two"), 0.5),
        "c.png": (("c",), 2.0),
    }
    assert {source.caption_file for source in sources.values()} == {jsonl / "metadata.jsonl"}
    table = images_in(tmp_path / "csv", "a.png", "b.png", "c.png")
    put(table / "c.txt", "from its file")
    rows = [
        ["file_name", "text", "weight"],
        ["a.png", 'a "fox", red\nrunning', ""],
        ["b.png", "b", "0"],
        ["c.png", "", "3"],
    ]
    write_csv(table / "metadata.csv", rows)
    assert [(source.captions, source.loss_weight) for source in found(table)] == [
        (('a "fox", red running',), 1.0),
        (("b",), 0.0),
        (("from its file",), 3.0),
    ]


def test_tables_of_kohyas_trainer(tmp_path: Path) -> None:
    folder = images_in(tmp_path, "a.png", "b.png", "sub/c.webp", "d.png")
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


def test_every_broken_row_is_reported_with_its_line(tmp_path: Path) -> None:
    folder = images_in(tmp_path, "a.png", "b.png", "c.png", "d.png")
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
    messages = [str(finding).partition(": ")[2] for finding in listing.findings]
    assert {finding.severity for finding in listing.findings} == {"error"}
    for number, what in (
        (2, "is not JSON"), (3, "is not a JSON object"), (4, "has no file_name"), (5, "has a caption, but not as text: 5"),
        (6, "has a weight that is not a number from 0: -1"), (7, "names 'none.png', which is not an image of this set"),
        (8, "names 'a.png' again, after line 1"), (9, "contains half of a character"), (10, "has file_name = 5"),
        (11, "has a weight that is not a number from 0: nan"),
    ):  # fmt: skip
        assert [line for line in messages if line.startswith(f"line {number} {what}")], (number, what, messages)
    assert len(messages) == 10


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("metadata.jsonl", b"\xff\xfe", "table-not-utf8", "not UTF-8 text (byte 0)"),
        ("metadata.jsonl", b"\n", "table-empty", "no rows"),
        ("metadata.csv", b"", "table-empty", "no rows"),
        ("metadata.csv", b"name,text\na.png,x\n", "table-columns", "no column file_name among name, text"),
        ("metadata.csv", b"file_name,text\na.png,x,y\n", "table-broken", "line 2 does not have 2 fields"),
        ("metadata.csv", b"file_name,text\na.png\n", "table-broken", "line 2 does not have 2 fields"),
        ("metadata.csv", b'file_name,text\na.png,"x\n', "table-broken", "line 2 is not CSV"),
        ("meta_x.json", b"{\n]", "table-broken", "line 2 is not JSON"),
        ("meta_x.json", b"[1]", "table-broken", "this table is not a JSON object"),
        ("meta_x.json", b'{"a": "fox"}', "table-broken", "entry 'a' is not a JSON object"),
        (
            "meta_x.json",
            b'{"a": {"tags": "x"}, "a": {"tags": "y"}}',
            "row-duplicate",
            "the key 'a' is in one object twice",
        ),
        ("meta_x.json", b'{"a": {"tags": "x"}, "a.png": {"tags": "y"}}', "row-duplicate", "names 'a.png' again"),
        ("meta_x.json", b"[" * 100_000, "table-broken", "this table is not JSON"),
        ("meta_x.json", b'{"a": {"loss_weight": 1' + b"0" * 5000 + b"}}", "table-broken", "this table is not JSON"),
    ],
)
def test_broken_tables(tmp_path: Path, name: str, content: bytes, code: str, message: str) -> None:
    put(tmp_path / "a.png"), put(tmp_path / "a.txt", "a"), put(tmp_path / name, content)
    findings = [finding for finding in listed(tmp_path).findings if finding.code != "caption-twice"]
    assert [(finding.code, finding.severity) for finding in findings] == [(code, "error")]
    assert f"{name}: " in str(findings[0])
    assert message in str(findings[0])


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
    for read in (table, others):
        assert len(read.rows) + len({finding.message for finding in read.findings}) >= bool(entries)
        json.dumps([row.name + (row.caption or "") + row.tags for row in read.rows], ensure_ascii=False).encode()


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
    folder = images_in(tmp_path, "a.png", "b.png")
    put(folder / "a.txt", "from its file")
    put(folder / "meta_a.json", '{"a": {"caption": "from the table"}, "b": {"caption": "b"}}')
    listing = listed(folder)
    assert codes(listing) == [("caption-twice", "warning", "a.txt")]
    assert texts(listing.sources)["a.png"] == ("from the table",)
    put(folder / "metadata.csv", "file_name\na.png\n")
    assert ("table-several", "error", tmp_path.name) in codes(listed(folder))
    assert texts(listed(folder, metadata=str(folder / "meta_a.json")).sources)["b.png"] == ("b",)


def test_a_named_table_says_which_images_are_used(tmp_path: Path) -> None:
    folder = images_in(tmp_path / "in", "a.png", "b.png", "c.png")
    other = put(tmp_path / "out" / "d.png")
    table = put(tmp_path / "lists" / "mine.json", json.dumps({"a": {"caption": "a"}, str(other): {"caption": "d"}}))
    listing = listed(folder, metadata=str(table))
    assert texts(listing.sources) == {"a.png": ("a",), "d.png": ("d",)}
    assert codes(listing) == [("image-unused", "warning", "in")]
    assert "2 of its 4 images are not in" in str(listing.findings[0])
    beside = put(tmp_path / "out" / "rows.jsonl", '{"file_name": "d.png", "text": "d"}')
    assert texts(listed(folder, metadata=str(beside)).sources) == {"d.png": ("d",)}
    assert "table-unreadable" in [code for code, *_ in codes(listed(folder, metadata=str(tmp_path / "none.csv")))]
    assert "table-unreadable" in [code for code, *_ in codes(listed(folder, metadata=str(folder / "a.png")))]
