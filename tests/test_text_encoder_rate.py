"""The learning rate of the text encoders where none is stated: by the family of the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sdlora.config.loading import load_config
from sdlora.training.new_adapter import new_adapter
from sdlora.training.plan import RunPlan, plan_config
from tests.tiny import opened


def plan(base: Path, images: Path, *more: str) -> RunPlan:
    required = ["data.trigger=zorb", "output.path=x.safetensors", "data.resolution=64"]
    return plan_config(load_config(None, [f"base.path={base}", f"data.images={images}", *required, *more]))


@pytest.mark.parametrize(("family", "rate"), [("sd1", "5e-05"), ("sd2", "5e-05"), ("sdxl", "0.0")])
def test_the_default_is_that_of_the_family(family: str, rate: str, tiny_files: dict[str, Path], images: Path) -> None:
    planned = plan(tiny_files[family], images)
    assert planned.identity.config["optimizer.text_encoder_learning_rate"] == rate
    groups = new_adapter(opened(tiny_files[family]), planned.config).groups
    trained = {group.part for group in groups}
    assert [group.rate for group in groups] == ([3e-4] if family == "sdxl" else [3e-4, 5e-5])
    assert trained == ({"unet"} if family == "sdxl" else {"unet", "text_encoder"})


def test_what_is_stated_goes_before(tiny_files: dict[str, Path], images: Path) -> None:
    stated = plan(tiny_files["sdxl"], images, "optimizer.text_encoder_learning_rate=1e-4")
    groups = new_adapter(opened(tiny_files["sdxl"]), stated.config).groups
    assert [group.rate for group in groups] == [3e-4, 1e-4, 1e-4]
    frozen = plan(tiny_files["sd1"], images, "optimizer.text_encoder_learning_rate=0")
    assert frozen.config.optimizer.text_encoder_learning_rate == 0


def test_a_run_of_an_earlier_version_is_the_same_run(tiny_files: dict[str, Path], images: Path) -> None:
    """It recorded the default of all families: 5e-5."""
    identity = plan(tiny_files["sd1"], images).identity
    earlier = replace(identity, config={**identity.config, "optimizer.text_encoder_learning_rate": "5e-05"})
    assert identity.differences(earlier) == []
    other = plan(tiny_files["sdxl"], images).identity
    assert other.differences(replace(other, config=earlier.config | {"base.path": other.config["base.path"]})) == [
        "optimizer.text_encoder_learning_rate was 5e-05, is now 0.0"
    ]
