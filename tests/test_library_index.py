"""The index of libraries and its faults, what is read only once, and files with equal tensors."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdlora
from sdlora.errors import Interrupted, LoraFileError
from sdlora.formats.hashes import hash_file
from sdlora.formats.safetensors_header import RawHeader, read_raw_header, split_header
from sdlora.library import equal, header, index
from sdlora.library.text import as_text
from sdlora.progress import Silence
from tests.library_files import KEY, listed, write

FOREIGN = Path(__file__).parent / "foreign"


@pytest.fixture(autouse=True)
def own_index(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers are read, as they are."""
    names: list[str] = []
    read = header.read_raw_header

    def noted(path: Path, error: type[LoraFileError]) -> RawHeader:
        names.append(path.name)
        return read(path, error)

    monkeypatch.setattr(header, "read_raw_header", noted)
    return names


def test_only_what_changed_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    for name in "abc":
        write(tmp_path / "x" / f"{name}.safetensors")
    write(tmp_path / "xy.safetensors")
    first = listed(tmp_path)
    assert sorted(reads) == ["a.safetensors", "b.safetensors", "c.safetensors", "xy.safetensors"]
    assert listed(tmp_path) == first
    assert [entry.name for entry in listed(tmp_path / "x").loras] == ["a", "b", "c"]
    assert len(reads) == 4
    write(tmp_path / "x" / "a.safetensors", rank=8, ss_output_name="other")
    (tmp_path / "x" / "b.safetensors").unlink()
    (tmp_path / "x" / "c.json").write_text('{"activation text": "new"}')
    again = listed(tmp_path)
    assert reads[4:] == ["a.safetensors", "c.safetensors"]
    assert [(e.name, e.rank, e.alias, e.trigger) for e in again.loras] == [
        ("a", "8", "other", ()),
        ("c", "4", None, ("new",)),
        ("xy", "4", None, ()),
    ]
    with sqlite3.connect(index.index_file()) as kept:
        assert kept.execute("SELECT count(*) FROM files").fetchone() == (3,)


def test_tables_of_one_layout_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.safetensors", seed=number, ss_output_name=f"n{number}", x="é" * number)
    write(tmp_path / "8.safetensors", rank=8, ss_output_name="n")
    parsed, parse = [], header.read_table
    monkeypatch.setattr(header, "read_table", lambda *given: (parsed.append(given[0].name), parse(*given))[1])
    loras = listed(tmp_path).loras
    assert [entry.alias for entry in loras] == ["n0", "n1", "n2", "n3", "n4", "n"]
    assert len({entry.layout for entry in loras}) == len(parsed) == 2


@pytest.mark.parametrize("letters", [10, 65_500, 65_536, 70_000, 200_000])
def test_metadata_of_any_length_are_split_off(tmp_path: Path, letters: int) -> None:
    """Read in a piece, which their end may lie beyond or cut through."""
    for name, letter in (("one", "x"), ("two", "é"), ("three", '"'), ("four", "}")):
        write(tmp_path / f"{name}.safetensors", ss_output_name=name, a=letter * letters, z="ü" * letters)
    library = listed(tmp_path)
    assert {entry.name: len({entry.layout for entry in library.loras}) for entry in library.loras} == dict.fromkeys(
        ("one", "two", "three", "four"), 1
    )
    for entry in library.loras:
        split = split_header(read_raw_header(tmp_path / entry.file, LoraFileError))
        assert split is not None
        with safe_open(tmp_path / entry.file, "pt") as file:
            assert split[0] == file.metadata()
        assert set(json.loads("{" + bytes(split[1]).decode().removeprefix(","))) == set(
            load_file(tmp_path / entry.file)
        )


def garbage(file: Path) -> None:
    file.write_bytes(b"not a database " * 999)


def torn(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:4096] + os.urandom(len(content) - 4096))


def of_another_version(file: Path) -> None:
    with sqlite3.connect(file) as kept:
        kept.executescript("DROP TABLE files; CREATE TABLE files (x); PRAGMA user_version = 99")


def of_another_program(file: Path) -> None:
    with sqlite3.connect(file) as kept:
        kept.executescript("DROP TABLE files; CREATE TABLE files (x)")


def with_other_content(file: Path) -> None:
    with sqlite3.connect(file) as kept:
        kept.execute("UPDATE files SET facts = '{\"a\": 1}'")


def with_broken_content(file: Path) -> None:
    with sqlite3.connect(file) as kept:
        kept.execute("UPDATE layouts SET facts = 'x'")


@pytest.mark.parametrize(
    "damage", [garbage, torn, of_another_version, of_another_program, with_other_content, with_broken_content]
)
def test_a_damaged_index_is_made_anew(tmp_path: Path, reads: list[str], damage: Any) -> None:
    for number in range(30):
        write(tmp_path / f"{number:02}.safetensors", rank=1, ss_output_name="o" * 300)
    first = listed(tmp_path)
    damage(index.index_file())
    assert listed(tmp_path) == first
    assert len(reads) == 60
    assert listed(tmp_path) == first
    assert len(reads) == 60


def test_without_a_place_for_the_index_everything_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "loras" / "a.safetensors")
    write(tmp_path / "loras" / "b.safetensors")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    library = listed(tmp_path / "loras", duplicates=True)
    assert library.duplicates == (("a.safetensors", "b.safetensors"),)


def test_an_index_that_another_process_writes_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    write(tmp_path / "a.safetensors")
    first = listed(tmp_path)
    monkeypatch.setattr(index, "WAIT", 0.01)
    other = sqlite3.connect(index.index_file(), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert listed(tmp_path) == first
    other.execute("ROLLBACK")
    other.close()
    assert listed(tmp_path) == first
    assert len(reads) == 2


def test_what_was_read_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    from sdlora.library import listing

    monkeypatch.setattr(listing, "_AT_ONCE", 2)
    for name in "abcde":
        write(tmp_path / f"{name}.safetensors")
    stop = threading.Event()

    class StopsAfterTwo(Silence):
        def advance(self, count: int = 1, note: str = "") -> None:
            stop.set()

    with pytest.raises(Interrupted, match="what was read is kept"):
        sdlora.list_loras(tmp_path, progress=StopsAfterTwo(), stop=stop)
    assert len(reads) == 2
    assert len(listed(tmp_path).loras) == len(reads) == 5


def test_equal_tensors_are_found_whatever_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.safetensors", seed=1, rank=64, ss_output_name="one")
    write(tmp_path / "copy" / "b.safetensors", seed=1, rank=64, ss_output_name="another, and longer")
    write(tmp_path / "c.safetensors", seed=2, rank=64)
    write(tmp_path / "other-rank.safetensors", seed=1, rank=8)
    tensors = load_file(tmp_path / "a.safetensors")
    tensors[f"{KEY}.lora_down.weight"].view(-1)[5000] += 1  # Between two of the sampled places.
    save_file(tensors, tmp_path / "d.safetensors")
    hashed, hash_one = [], equal.file_hashes
    monkeypatch.setattr(equal, "file_hashes", lambda path: (hashed.append(path.name), hash_one(path))[1])
    library = listed(tmp_path, duplicates=True)
    assert library.duplicates == (("a.safetensors", "copy/b.safetensors"),)
    assert sorted(hashed) == ["a.safetensors", "b.safetensors", "d.safetensors"]
    assert listed(tmp_path, duplicates=True) == library
    assert len(hashed) == 3
    found = {entry.file: entry for entry in library.loras}
    assert found["a.safetensors"].autov3 == found["copy/b.safetensors"].autov3
    assert found["a.safetensors"].autov2 != found["copy/b.safetensors"].autov2
    assert not found["c.safetensors"].hashed
    assert listed(tmp_path, duplicates=True, search="other-rank").duplicates == ()
    assert "equal tensors: a.safetensors, copy/b.safetensors" in as_text(library)


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", sshs_model_hash="ab" * 32, ss_output_name="other")
    (entry,) = listed(tmp_path, hashes=True).loras
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert entry.autov2 == hashlib.sha256(content).hexdigest()[:10]
    assert entry.autov3 == hashlib.sha256(content[start:]).hexdigest()[:12] == hash_file(file, start).autov3
    assert entry.hashed
    assert listed(tmp_path, search="other").loras == (entry,)
