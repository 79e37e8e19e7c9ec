"""Small texts that several commands share: paths in a configuration, names of checkpoints, tables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdlora.aligned import aligned
from sdlora.config.loading import load_config
from sdlora.config.locations import from_folder
from sdlora.formats.run_names import checkpoint_name, step_of_checkpoint


def read_back(images: Path, folder: Path) -> tuple[str, str]:
    """How ``images`` is stated in a file in ``folder``, and where that leads when the file is read."""
    stated = from_folder(str(images), folder)
    file = folder / "run.toml"
    file.write_text(f'[data]\nimages = "{stated}"\ntrigger = "zorb"\n[output]\npath = "a.safetensors"\n')
    return stated, os.path.realpath(load_config(file).data.images or "")


def test_a_path_is_stated_so_that_a_file_in_its_folder_leads_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("images", "real/runs/a", "own"):
        Path(name).mkdir(parents=True)
    assert read_back(Path("images"), Path("real/runs/a")) == ("../../../images", os.path.realpath("images"))
    assert read_back(Path("real/runs/a"), Path("real")) == ("runs/a", os.path.realpath("real/runs/a"))
    assert read_back(tmp_path / "images", Path("own")) == ("../images", os.path.realpath("images"))


def test_from_a_link_a_path_goes_up_as_the_system_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("images", "far/away/runs", "real/runs"):
        Path(name).mkdir(parents=True)
    Path("link").symlink_to(tmp_path / "far" / "away" / "runs")
    assert read_back(Path("images"), Path("link")) == ("../../../images", os.path.realpath("images"))
    # What the short way does reach, through however many links, is stated in that way.
    Path("linked").symlink_to(tmp_path / "real")
    assert read_back(Path("linked/runs"), Path("linked")) == ("runs", os.path.realpath("real/runs"))


def test_names_of_checkpoints() -> None:
    assert checkpoint_name(300) == "step-00000300.safetensors"
    assert [step_of_checkpoint(checkpoint_name(step)) for step in (0, 7, 123_456_789)] == [0, 7, 123_456_789]
    assert sorted(map(checkpoint_name, (100, 20, 3))) == [*map(checkpoint_name, (3, 20, 100))]
    for name in (
        "last.safetensors",
        "step-.safetensors",
        "step-12",
        "step-1a.safetensors",
        "step-1.safetensors.partial",
    ):
        assert step_of_checkpoint(name) is None


def test_columns_are_side_by_side() -> None:
    rows = [("name", "size", "note"), ("a", "1,000", ""), ("long name", "2", "x")]
    assert aligned(rows, right=("size",)) == ["name        size  note", "a          1,000", "long name      2  x"]
