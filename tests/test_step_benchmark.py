"""The benchmark of a step runs: every side trains, and each is compared with ours."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import train_step


def test_every_side_takes_its_turn(
    tiny_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "STEPS_A_TURN", 1)
    arguments = Namespace(base=str(tiny_files["sd1"]), resolution=64, precision="float32", rank=4)
    setting = train_step.open_setting(arguments, tmp_path, batch=2)
    sides = ["ours", "peft", "example", "floor"]
    result = train_step.compare(setting, sides, rounds=1)
    compared = {f"ours / {side}" for side in sides[1:]}
    assert set(result) == {"batch", "resolution", "dtype", *(f"{side}, ms" for side in sides), *compared}
    assert all(result[f"{side}, ms"] > 0 for side in sides)
    assert all(least <= middle <= most for middle, least, most in (result[name] for name in compared))
