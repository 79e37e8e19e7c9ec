"""The contact sheet of a dataset: what is trained on, with captions beneath."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlora.errors import DataError
from sdlora.lint.sheet import COLUMNS, GAP, VEIL, image_as_seen, write_sheets
from sdlora.progress import Silence
from tests.lint_sets import add, clean, lint_folder, noise


def test_the_sheet_shows_what_is_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    # Left third red, middle green, right blue: the crop to 128 x 128 of 384 x 128 would keep the middle.
    stripes = Image.new("RGB", (192, 64), "lime")
    stripes.paste("red", (0, 0, 32, 64))
    stripes.paste("blue", (160, 0, 192, 64))
    add(folder, "a.png", stripes)
    masked = Image.new("RGBA", (64, 64), (0, 200, 100, 255))
    masked.paste((9, 9, 9, 0), (0, 0, 32, 64))
    add(folder, "b.png", masked)
    add(folder, "c.png", Image.new("RGB", (32, 32), "navy"), caption="w" * 900 + " " + "many words " * 200)
    report = lint_folder(folder, "data.mask=alpha", resolution=64)
    (sheet,) = write_sheets(
        report.examined,
        report.placements,
        background="#ffffff",
        mask="alpha",
        file=tmp_path / "new" / "sheet.png",
        progress=Silence(),
    )
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    first = report.placements[0]
    cell_pixels = pixels[GAP : GAP + first.height, GAP : GAP + first.width]
    assert cell_pixels.shape[1] > cell_pixels.shape[0]
    assert cell_pixels[first.height // 2, first.width // 2].tolist() == [0, 255, 0]
    share = (cell_pixels[first.height // 2] == [255, 0, 0]).all(axis=1).mean()
    cut = first.cut_off
    assert share == pytest.approx((1 / 6 - cut / 2) / (1 - cut), abs=0.04)
    cell = max(128, *(place.width for place in report.placements)) + GAP
    second = pixels[GAP : GAP + 64, GAP + cell : GAP + cell + 64]
    assert second[32, 10].tolist() == list(VEIL)
    assert second[32, 60].tolist() == [0, 200, 100]
    third = pixels[GAP : GAP + 64, GAP + 2 * cell : GAP + 2 * cell + 64]
    assert (third == [0, 0, 128]).all()
    # Captions are beneath, within their own columns.
    beneath = pixels[GAP + max(place.height for place in report.placements) :]
    for number in range(3):
        assert (beneath[:, GAP + number * cell : (number + 1) * cell] < 120).all(axis=2).any()
    gaps = [slice((number + 1) * cell, GAP + (number + 1) * cell) for number in range(2)]
    assert all((beneath[:, gap] == 255).all() for gap in gaps)


def test_the_sheet_shows_the_salient_part(tmp_path: Path) -> None:
    image = Image.new("RGB", (640, 64), "grey")
    image.paste(noise("busy", 100, 64), (540, 0))
    add(tmp_path / "set", "a.png", image)
    for crop, busy in (("center", False), ("salient", True)):
        report = lint_folder(tmp_path / "set", f"data.crop={crop}", resolution=64)
        seen = image_as_seen(report.examined[0], report.placements[0], background="#ffffff", mask="none")
        assert (max(np.asarray(seen).std(axis=(0, 1))) > 20) == busy


def test_a_large_set_has_several_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.lint.sheet.ROWS", 1)
    report = lint_folder(clean(tmp_path / "set", COLUMNS + 1))
    sheets = write_sheets(
        report.examined,
        report.placements,
        background="#ffffff",
        mask="none",
        file=tmp_path / "s.png",
        progress=Silence(),
    )
    assert [sheet.name for sheet in sheets] == ["s.png", "s-2.png"]
    assert {file.name for file in tmp_path.glob("*.png")} == {"s.png", "s-2.png"}
    with pytest.raises(DataError, match=r"s.png/x.png: cannot be written"):
        write_sheets(
            report.examined,
            report.placements,
            background="#ffffff",
            mask="none",
            file=tmp_path / "s.png" / "x.png",
            progress=Silence(),
        )
