"""Learning rates against diffusers' own schedules, and the ways to state the warm-up."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import get_args

import pytest
import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

from sdlora.config.loading import load_config
from sdlora.config.optimizer_section import OptimizerSection, Schedule
from sdlora.errors import ConfigError
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.rates import SCHEDULES, rate_factor

STEPS, WARMUP = 97, 12
NEEDED = ("data.images=images", "data.trigger=zorb", "output.path=x.safetensors")


def theirs(name: str, **arguments: object) -> list[float]:
    """Diffusers' factor of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # Its own default ends at 1e-7 instead of 0.
    polynomial = partial(get_polynomial_decay_schedule_with_warmup, lr_end=0.0)
    make = polynomial if name == "polynomial" else partial(get_scheduler, name)
    lengths = {"num_warmup_steps": WARMUP, "num_training_steps": STEPS}
    scheduler = make(optimizer, **lengths, **arguments)  # ty: ignore[invalid-argument-type]
    factors = []
    for _ in range(STEPS):
        factors.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("schedule", "name", "ours", "arguments"),
    [
        ("constant", "constant_with_warmup", {}, {}),
        ("linear", "linear", {}, {}),
        ("cosine", "cosine", {}, {}),
        ("cosine_with_restarts", "cosine", {}, {}),
        ("cosine_with_restarts", "cosine_with_restarts", {"schedule_cycles": 5}, {"num_cycles": 5}),
        ("cosine_with_restarts", "cosine_with_restarts", {"schedule_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", "polynomial", {"schedule_power": 2.5}, {"power": 2.5}),
        ("polynomial", "linear", {}, {}),
    ],
)
def test_rates_after_the_warm_up_equal_those_of_diffusers(
    schedule: Schedule, name: str, ours: dict[str, float], arguments: dict[str, float]
) -> None:
    section = OptimizerSection.model_validate({"schedule": schedule, "warmup_steps": WARMUP, **ours})
    factors = [rate_factor(step, section, steps=STEPS) for step in range(STEPS)]
    assert factors[WARMUP:] == pytest.approx(theirs(name, **arguments)[WARMUP:], abs=1e-12)
    assert factors[:WARMUP] == pytest.approx([k / (WARMUP + 1) for k in range(1, WARMUP + 1)])


def test_every_schedule_that_can_be_set_is_there() -> None:
    assert set(SCHEDULES) == set(get_args(Schedule))


@pytest.mark.parametrize(("share", "steps", "expected"), [(0.05, 300, 15), (0.1, 97, 9), (0.5, 1, 0), (0.001, 600, 0)])
def test_a_share_of_the_steps_is_rounded_down(share: float, steps: int, expected: int) -> None:
    shared, counted = OptimizerSection(warmup_steps=share), OptimizerSection(warmup_steps=expected)
    assert [rate_factor(step, shared, steps=steps) for step in range(steps)] == [
        rate_factor(step, counted, steps=steps) for step in range(steps)
    ]


def test_the_optimizer_steps_at_the_rates_of_its_schedule() -> None:
    section = OptimizerSection(
        schedule="cosine_with_restarts", schedule_cycles=2, warmup_steps=0.25, weight_decay=0.0, max_grad_norm=1e9
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, places = GuardedAdamW([weight], [1e-2], section, steps=16), [0.0]
    for step in range(16):
        weight.grad = torch.ones(1)  # AdamW then moves by the rate itself.
        optimizer.step(step)
        places.append(weight.item())
    cosines = [0.5 + 0.5 * torch.tensor(torch.pi * k / 6).cos().item() for k in range(6)]
    expected = [0.2, 0.4, 0.6, 0.8, *cosines, *cosines]
    moved = [(before - after) / 1e-2 for before, after in pairwise(places)]
    assert moved == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value", ["1.5", "20.0", "-1", "-0.1", "0.0", "nan", "true", "some"])
def test_a_warm_up_that_is_neither_steps_nor_a_share_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps = .*: must be a whole number of steps, for exam"):
        load_config(None, (*NEEDED, f"optimizer.warmup_steps={value}"))


def test_whole_steps_are_stated_as_before() -> None:
    for given, written in (("20", "20"), ("0", "0"), ("0.05", "0.05")):
        config = load_config(None, (*NEEDED, f"optimizer.warmup_steps={given}"))
        assert config.flat()["optimizer.warmup_steps"] == written
