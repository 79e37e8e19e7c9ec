"""Which shape of a step is chosen for how much free memory, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from sdlora.config.sections import TrainSection
from sdlora.progress import Silence
from sdlora.training import session
from sdlora.training.fit import Fit, choose_fit
from sdlora.training.plan import plan_config
from sdlora.training.step_shape import StepShape
from tests.tiny import opened
from tests.training_runs import config_for, losses

GIGABYTE = 1e9


def shape(micro_batch: int, checkpointing: bool = False) -> StepShape:
    return StepShape(micro_batch=micro_batch, checkpointing=checkpointing)


def needed(step: StepShape) -> float:
    """Five gigabytes of weights; six for each image, one with checkpointing."""
    return (5 + step.micro_batch * (1 if step.checkpointing else 6)) * GIGABYTE


def fit(free: float, recorded: StepShape | None = None, **settings: Any) -> Fit:
    train = TrainSection(batch_size=4, **settings)
    return choose_fit(train, images=4, free=free * GIGABYTE, needed=needed, recorded=recorded)


@pytest.mark.parametrize(("free", "expected"), [
    (80, shape(4)), (33, shape(4)), (24, shape(2)), (16, shape(1)), (12, shape(4, True)), (8.4, shape(2, True)),
    (7.2, shape(1, True)), (4, shape(1, True)),
])  # fmt: skip
def test_the_first_shape_that_fits_is_chosen(free: float, expected: StepShape) -> None:
    chosen = fit(free)
    assert chosen.shape == expected
    assert 0 <= chosen.room <= max(0, free * GIGABYTE - needed(expected))
    assert f"free are {free:.1f} GB" in chosen.line
    assert ("may not fit" in chosen.line) == (free == 4)
    assert ("4 images at once, without gradient checkpointing would need 32.4 GB" in chosen.line) == (4 < free < 33)


def test_settings_and_what_a_run_has_done_go_before_free_memory() -> None:
    assert fit(24, micro_batch=3).shape == shape(3, True)
    assert fit(24, gradient_checkpointing=True).shape == shape(4, True)
    assert fit(12, gradient_checkpointing=False).shape == shape(1)
    both = fit(8, micro_batch=9, gradient_checkpointing=False)
    assert (both.shape, both.line, both.room) == (shape(4), "", 0)
    resumed = fit(80, recorded=shape(2, True))
    assert resumed.shape == shape(2, True)
    assert "as in the steps before" in resumed.line
    assert fit(80, recorded=shape(2, True), micro_batch=4, gradient_checkpointing=False).shape == shape(4)


def test_without_a_limit_a_step_is_the_whole_batch() -> None:
    def refuse(_: StepShape) -> float:
        raise AssertionError("calculated")

    chosen = choose_fit(TrainSection(batch_size=4), images=4, free=math.inf, needed=refuse, recorded=None)
    assert chosen == Fit(shape=shape(4), room=math.inf, line="")


def test_a_run_takes_what_fits_and_says_so(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's memory is that of the real base, in real captions and buckets."""

    def opening(free: float) -> tuple[session.TrainingSession, list[str]]:
        said: list[str] = []
        monkeypatch.setattr(session, "free_memory", lambda _: free)
        monkeypatch.setattr("sdlora.training.fit.CONTEXT", 0)
        plan = plan_config(config_for(tiny_base, images, tmp_path / "x.safetensors", "cache.disk=false"))
        base = opened(tiny_base)
        return session.open_session(plan, base, Accelerator(), Silence(), say=said.append), said

    unlimited, nothing = opening(math.inf)
    assert (unlimited.shape, nothing) == (shape(2), [])
    small, (line,) = opening(1e4)
    assert small.shape == shape(1, True)
    assert line.startswith("memory: one image at once, with gradient checkpointing of a batch of 2: ")
    large, (line,) = opening(1e9)
    assert large.shape == shape(2)
    assert losses(small, 2) == pytest.approx(losses(unlimited, 2), rel=1e-5)
    assert torch.equal(*(next(iter(each.images.values())).mean for each in (small, large)))
