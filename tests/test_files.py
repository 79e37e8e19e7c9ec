"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlora.files import whole_folder, write_new, write_png, write_whole


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def usual_mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


@pytest.mark.parametrize("durable", [True, False])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, durable: bool) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_whole(file, b"new", None, durable=durable)  # ty: ignore[invalid-argument-type]
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_by_all_of_its_chunks(tmp_path: Path, durable: bool) -> None:
    file = tmp_path / "new folder" / ("x" * 250)
    for content in (b"first", b"second"):
        write_whole(file, content, b" and more", durable=durable)
        assert file.read_bytes() == content + b" and more"
    assert file.stat().st_mode & 0o777 == usual_mode()
    assert names(file.parent) == [file.name]


def test_nothing_waits_for_the_disk_unless_it_is_to_be_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    write_whole(tmp_path / "x", b"", durable=False)
    assert calls == []
    write_whole(tmp_path / "x", b"")
    assert len(calls) == 2


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_never_replaces_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def link(*_: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", link)
    file = tmp_path / "x"
    assert write_new(file, b"first")
    assert not write_new(file, b"second")
    assert file.read_bytes() == b"first"
    assert file.stat().st_mode & 0o777 == usual_mode()
    assert names(tmp_path) == ["x"]


def test_a_new_file_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_new(tmp_path / "gone" / "x", b"")
    assert names(tmp_path) == []


def test_an_image_holds_its_texts(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    write_png(tmp_path / "a" / "x.png", image, [("parameters", "zorb, é\nSteps: 3")])
    with Image.open(tmp_path / "a" / "x.png") as found:
        assert found.format == "PNG"
        assert found.info == {"parameters": "zorb, é\nSteps: 3"}
        assert np.array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_appears_when_it_is_complete(tmp_path: Path, empty: bool) -> None:
    target = tmp_path / "a" / "b"
    if empty:
        target.mkdir(parents=True)
    with whole_folder(target) as partial:
        (partial / "x").write_text("1")
        assert partial.parent == target.parent
        assert target.exists() == empty
    assert names(target.parent) == ["b"]
    assert (target / "x").read_text() == "1"
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with whole_folder(tmp_path / "x") as partial:
            (partial / "y").mkdir()
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_a_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").touch()
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "x") as partial:
        (partial / "new").touch()
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["kept"]
