"""The factors that a change is relative to are a part of a run, whatever device or machine goes on with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sdlora as package
from sdlora.base.load import load_base
from sdlora.lora import relative_trainable
from sdlora.lora.relative_trainable import principal_factors
from sdlora.progress import Silence
from sdlora.training import session as sessions
from sdlora.training.plan import plan_config
from sdlora.training.session import TrainingSession, open_session
from tests.training_runs import config_for, same_but_for_times

SETTINGS = ("lora.init=pissa", "train.steps=4", "train.save_every=1")


class Stopped(Exception):
    pass


def with_other_signs(weight: Tensor, rank: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """What another library may return: the product is the same, the factors are not."""
    down, up = principal_factors(weight, rank, scale=scale)
    return -down, -up


def stop_before(number: int) -> Callable[..., Tensor]:
    take_step = TrainingSession.step

    def step(self: TrainingSession, step: int) -> Tensor:
        if step == number:
            raise Stopped
        return take_step(self, step)

    return step


def test_a_run_resumed_where_singular_vectors_have_other_signs_equals_an_uninterrupted_one(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (tmp_path / name / "x.safetensors" for name in ("whole", "parts"))
    package.train(config_for(tiny_base, images, whole, *SETTINGS))
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "step", stop_before(2))
        with pytest.raises(Stopped):
            package.train(config_for(tiny_base, images, parts, *SETTINGS))
    monkeypatch.setattr(relative_trainable, "principal_factors", with_other_signs)
    assert package.train(config_for(tiny_base, images, parts, *SETTINGS)).result.resumed_from == 2
    same_but_for_times(whole, parts)


def test_another_machine_would_go_elsewhere(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test above would say nothing."""
    one, other = (tmp_path / name / "x.safetensors" for name in ("one", "other"))
    package.train(config_for(tiny_base, images, one, *SETTINGS))
    monkeypatch.setattr(relative_trainable, "principal_factors", with_other_signs)
    package.train(config_for(tiny_base, images, other, *SETTINGS))
    first, second = load_file(one), load_file(other)
    assert any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("init", ["pissa", "orthogonal", "default"])
def test_every_process_starts_from_the_factors_and_averages_of_the_first(
    init: str, tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (f"lora.init={init}", "optimizer.ema=0.9")
    plan = plan_config(config_for(tiny_base, images, tmp_path / "x.safetensors", *more))
    base = load_base(plan.base, device=torch.device("cpu"), dtype=torch.float32)
    monkeypatch.setattr(sessions, "same_in_all", lambda tensor: tensor.view(torch.uint8).zero_())
    group: Any = SimpleNamespace(num_processes=2, process_index=1, is_main_process=False)
    session = open_session(plan, base, group, Silence())
    started = {name: t for name, t in session.optimizer.state().items() if name.startswith(("parameter.", "average."))}
    assert len(started) == 2 * len(session.adapter.parameters)
    assert bool(session.adapter.fixed) == (init != "default")
    assert not any(tensor.any() for tensor in (*started.values(), *session.adapter.fixed.values()))
