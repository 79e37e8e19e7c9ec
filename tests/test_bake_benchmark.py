"""The benchmark of baking: both sides write a file, and leave none."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import bake
from benchmarks.stack import write_files
from sdlora.families import FAMILIES
from tests.tiny import write_tiny_ldm


def test_both_sides_are_timed_and_nothing_is_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base.safetensors"
    pipe = write_tiny_ldm(base, "sd1")
    (lora,) = write_files(tmp_path, pipe.unet, FAMILIES["sd1"], rank=4, count=1)
    row = bake.compare(base, lora, rounds=1)
    assert row["copy, s"] > 0
    assert row["bake, s"] > 0
    assert row["bake / copy"][0] > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([base.name, lora.name])
