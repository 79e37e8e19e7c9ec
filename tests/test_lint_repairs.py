"""``sdlora lint --fix``: what can be repaired is repaired in a copy, and the dataset stays untouched."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdlora.data.images import open_image
from sdlora.errors import DataError
from sdlora.lint.repair import _decoded as decoded_caption
from sdlora.lint.repair import write_repaired
from sdlora.lint.report import LintReport
from sdlora.progress import Silence
from tests.lint_sets import (
    add,
    clean,
    content,
    faulty_captions,
    lint_folder,
    linted,
    noise,
    odd_images,
    repeated_images,
    sets_toml,
    unreadable_images,
)

REPAIRED = {
    *("image-empty", "image-unknown", "image-truncated", "image-damaged", "image-too-large"),
    *("image-needs-package", "image-extension", "image-turned", "image-duplicate", "caption-extension"),
    *("caption-not-utf8", "trigger-absent", "trigger-in-word", "stem-collision", "caption-unused", "image-format"),
}


def test_repairs_go_into_a_copy(sdlora, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    clean(folder)
    for build in (unreadable_images, odd_images, repeated_images, faulty_captions):
        build(folder)
    before = content(folder)
    stamps = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    made = sdlora("lint", "set", "--trigger", "zorb", "--fix", "--out", "copy", "--json")
    assert made.returncode == 1, made.stderr
    assert made.stderr == ""
    assert content(folder) == before
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == stamps
    answer = json.loads(made.stdout)
    codes = {finding["code"] for finding in answer["findings"]}
    # Where its package is installed, an image that needs one is damaged like another.
    assert codes >= REPAIRED - {"image-needs-package"}
    again = json.loads(sdlora("lint", "copy", "--trigger", "zorb", "--json").stdout)
    left = {finding["code"] for finding in again["findings"]}
    assert left == codes - REPAIRED
    assert again["images"] == answer["copy"]["images"] == answer["images"] - 6 - 1
    copy = content(tmp_path / "copy")
    assert copy["latin.txt"].decode() == "zorb, ein Bär\n"
    assert copy["elsewhere.txt"] == b"zorb, a thing of its own\n"
    assert copy["absent.txt"] == b"zorb, an owl in a tree\n"
    assert {"lies.jpg", "collision.jpg", "collision-png.png", "collision-png.txt"} <= set(copy)
    assert copy["clean0.png"] == before["clean0.png"]
    assert copy["lies.jpg"] == before["lies.png"]
    with Image.open(tmp_path / "copy" / "turned.jpg") as image:
        assert image.getexif().get(0x0112, 1) == 1
    apart = np.asarray(open_image(tmp_path / "copy" / "turned.jpg")).astype(int) - open_image(folder / "turned.jpg")
    assert np.abs(apart).mean() < 2
    repaired = Counter(repair["code"] for repair in answer["repairs"])
    assert repaired["image-unreadable"] == 6
    assert (repaired["image-duplicate"], repaired["image-turned"], repaired["stem-collision"]) == (1, 1, 1)
    assert not list(tmp_path.glob(".copy*"))


def repair_into(report: LintReport, out: Path) -> None:
    write_repaired(report.data, report.listing.sources, report.examined, out=out, progress=Silence())


def test_a_copy_has_the_shape_of_the_dataset(tmp_path: Path) -> None:
    add(tmp_path / "a" / "10_fox", "x.png")
    add(tmp_path / "a" / "deep" / "er", "x.png", noise("other"))
    (tmp_path / "a" / "10_fox" / "mask").mkdir()
    Image.new("L", (128, 128), 255).save(tmp_path / "a" / "10_fox" / "mask" / "x.png")
    add(tmp_path / "b" / "a", "y.png", caption="a fox")
    sets = [f'images = "{tmp_path / "a"}"', f'images = "{tmp_path / "b" / "a"}"\nrole = "regularisation"']
    (tmp_path / "run.toml").write_text(sets_toml(*sets, more='mask = "files"\ncaption_extension = "caption"'))
    for file in tmp_path.rglob("*.txt"):
        file.rename(file.with_suffix(".caption"))
    repair_into(linted(tmp_path / "run.toml"), tmp_path / "copy")
    assert set(content(tmp_path / "copy")) == {
        *("1-a/10_fox/x.png", "1-a/10_fox/x.caption", "1-a/10_fox/mask/x.png"),
        *("1-a/deep/er/x.png", "1-a/deep/er/x.caption", "2-a/y.png", "2-a/y.caption"),
    }
    assert (tmp_path / "copy" / "2-a" / "y.caption").read_text() == "a fox\n"


def test_captions_of_a_table_are_written_to_files(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set", 5)
    for file in folder.glob("*.txt"):
        file.unlink()
    rows = [json.dumps({"file_name": f"clean{number}.png", "text": f"zorb, {number}"}) for number in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    repair_into(lint_folder(folder), tmp_path / "copy")
    assert (tmp_path / "copy" / "clean3.txt").read_text() == "zorb, 3\n"
    assert lint_folder(tmp_path / "copy").findings == ()


@given(st.text(min_size=1, max_size=40), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]))
def test_captions_are_decoded_as_they_were_encoded(text: str, encoding: str) -> None:
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        return
    decoded = decoded_caption(data)
    if encoding != "cp1252":
        assert decoded == text.removeprefix("\ufeff") or encoding == "utf-8"
    else:
        with contextlib.suppress(UnicodeDecodeError):
            # What is UTF-8 by its bytes is taken for UTF-8.
            assert decoded == data.decode("utf-8-sig")
            return
        assert decoded == text or data[:2] in (b"\xff\xfe", b"\xfe\xff")


def test_a_copy_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = lint_folder(clean(tmp_path / "set"))
    before = content(tmp_path)
    for out in (tmp_path / "set", tmp_path / "set" / "copy", tmp_path, tmp_path / "set" / "clean0.png"):
        with pytest.raises(DataError, match=r"exists already|cannot lie within"):
            repair_into(report, out)
    import shutil

    real, left = shutil.copyfile, [3]

    def failing(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr("sdlora.lint.repair.shutil.copyfile", failing)
    with pytest.raises(DataError, match=r"copy: cannot be written: No space left"):
        repair_into(report, tmp_path / "copy")
    assert content(tmp_path) == before
    monkeypatch.undo()
    (tmp_path / "copy").mkdir()
    repair_into(report, tmp_path / "copy")
    assert len(content(tmp_path / "copy")) == 12
