"""The benchmark of generating: both sides make the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import generate

pytestmark = pytest.mark.filterwarnings("ignore")


def test_both_sides_make_the_same_images(tiny_base: Path, tmp_path: Path) -> None:
    base = generate.open_base(str(tiny_base), "float32", tmp_path)
    sides = generate.sides_of(base, batch=2, steps=3, sampler="euler", size=64)
    ours, theirs = (np.stack([np.asarray(image, int) for image in draw()]) for draw in sides.values())
    assert ours.shape == theirs.shape == (2, 64, 64, 3)
    assert abs(ours - theirs).max() <= 1
    assert abs(ours[0] - ours[1]).max() > 10
    row = generate.compare(base, batch=1, steps=1, sampler="euler", size=64, rounds=2)
    assert row["sdlora, images/s"] > 0
    assert row["diffusers / sdlora, time"][0] > 0
