"""The benchmarks of a step run: every side trains, each is compared with ours, and a profile adds up."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import profile_step, train_step


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


def test_the_profile_adds_up_to_the_step_and_names_what_only_training_has(
    tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    arguments = Namespace(base=str(tiny_files["sd1"]), resolution=64, precision="float32", rank=4)
    setting = train_step.open_setting(arguments, tmp_path, batch=1)
    spent = profile_step.compare(setting, ["ours", "floor"], steps=1)
    assert spent["ours"]["optimizer"] > 0
    assert spent["floor"]["optimizer"] == 0
    for kind in ("matrix products", "convolutions", "attention", "norms", profile_step.OUTSIDE):
        assert spent["ours"][kind] > 0, kind
    *kinds, whole = profile_step.table(spent)
    assert whole["share of ours, %"] == 100
    assert sum(row["ours, ms"] for row in kinds) == pytest.approx(whole["ours, ms"], rel=0.02)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_group_norm_backward", "norms"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::add_", "sums and products by element"),
        ("aten::_upsample_nearest2d", profile_step.OTHER),
    ],
)
def test_operations_have_a_kind(operation: str, kind: str) -> None:
    assert profile_step.kind_of(operation) == kind
