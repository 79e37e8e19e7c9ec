"""The style measures tell the sample sets from each other and from the base's styles."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from recipes.mini.fidelity import load_sheet
from tests.conftest import ROOT
from tests.measures import MEASURES, THRESHOLDS

REFERENCES = ROOT / "tests" / "references"


def images(name: str) -> list[Image.Image]:
    return [Image.open(file).resize((128, 128)) for file in sorted((ROOT / "datasets" / name).glob("*.png"))]


@pytest.mark.parametrize("style", MEASURES)
def test_real_images_are_on_their_side(style: str) -> None:
    other = next(name for name in MEASURES if name != style)
    assert min(map(MEASURES[style], images(style))) > THRESHOLDS[style]
    assert max(map(MEASURES[style], images(other))) < THRESHOLDS[style]


def test_sample_sets_are_complete() -> None:
    for style, trigger in (("blueprint", "blupaper"), ("pixel", "pixgrid")):
        files = sorted((ROOT / "datasets" / style).glob("*.png"))
        assert 24 <= len(files) <= 40
        for file in files:
            assert file.with_suffix(".txt").read_text().startswith(f"{trigger}, ")


def test_the_feature_space_finds_the_same_subject_in_another_style() -> None:
    subjects = (REFERENCES / "subjects.txt").read_text().splitlines()
    base = load_sheet(REFERENCES / "base.png", subjects)
    for style, least in (("blueprint", 0.25), ("pixel", 0.25)):
        sheet = Image.open(REFERENCES / f"{style}.png")
        side = sheet.width // len(subjects)
        tiles = [sheet.crop((i * side, 0, (i + 1) * side, side)) for i in range(len(subjects))]
        assert base.fidelity(tiles, subjects) > least
    assert base.chance < 0.01


def test_sheets_hold_what_the_sets_show() -> None:
    subjects = (REFERENCES / "subjects.txt").read_text().splitlines()
    gallery = load_sheet(REFERENCES / "blueprint.png", subjects)
    for file in sorted(Path(ROOT / "datasets" / "blueprint").glob("*.png")):
        assert gallery.nearest(Image.open(file)) == file.stem.replace("-", " ")
