"""The benchmark from a folder to a file: its parts add up to the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import end_to_end
from tests.conftest import write_images


def test_the_parts_of_a_run_add_up(tiny_base: Path, tmp_path: Path) -> None:
    images = end_to_end.sample_images(write_images(tmp_path / "source", 3), tmp_path / "images", 2)
    assert sorted(file.name for file in images.iterdir()) == ["0.png", "0.txt", "1.png", "1.txt"]
    settings = ["--base", str(tiny_base), "--steps", "2", "data.resolution=64"]
    empty, filled = end_to_end.compare(images, settings, rounds=1)
    assert (empty["cache"], filled["cache"]) == ("empty", "filled")
    for row in (empty, filled):
        assert 0 < row["first step, s"] < row["total, s"]
        assert 0 < row["steps, s"] < row["total, s"]
        inside, rest = row["steps, s"], row["rest, s"]
        assert row["share inside steps"][0] == pytest.approx(inside / (inside + rest), rel=0.02)


def test_a_run_that_fails_ends_the_benchmark_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere"):
        end_to_end.run_command(["--images", str(tmp_path / "nowhere"), "--trigger", "zorb"], tmp_path)
