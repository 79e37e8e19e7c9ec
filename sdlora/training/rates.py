"""How the learning rates develop: a factor on their peaks, by the step alone; and how long a part is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..config.optimizer_section import OptimizerSection, Schedule


def rate_factor(step: int, section: OptimizerSection, *, steps: int) -> float:
    """Factor of the learning rates at ``step`` (from 0) of ``steps``: linear warm-up, then the schedule."""
    warmup = warmup_length(section, steps=steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[section.schedule]((step - warmup) / max(1, steps - warmup), section)


def warmup_length(section: OptimizerSection, *, steps: int) -> int:
    """Steps of the warm-up."""
    return _whole_steps(section.warmup_steps, steps)


def steps_of(part: str, section: OptimizerSection, *, steps: int, planned: int | None = None) -> int:
    """Number of steps in which ``part``, ``unet`` or a text encoder, is trained.

    A share of the steps is one of the ``planned`` steps where the run was extended: what has stopped stays as it is.
    """
    stop = section.text_encoder_stop
    return steps if part == "unet" or stop is None else min(steps, _whole_steps(stop, planned or steps))


def _whole_steps(stated: float, steps: int) -> int:
    """A share of ``steps`` is rounded down, as in kohya's trainer."""
    return stated if isinstance(stated, int) else int(stated * steps)


def constant(progress: float, section: OptimizerSection) -> float:
    """Always 1."""
    return 1.0


def linear(progress: float, section: OptimizerSection) -> float:
    """A line from 1 to 0."""
    return 1 - progress


def cosine(progress: float, section: OptimizerSection) -> float:
    """Half a cosine wave from 1 to 0 (Loshchilov & Hutter 2017, equation 5, with one period)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def cosine_with_restarts(progress: float, section: OptimizerSection) -> float:
    """``schedule_cycles`` cosines of the same length, each from 1 to 0 (Loshchilov & Hutter 2017, equation 5)."""
    return cosine(section.schedule_cycles * progress % 1.0, section)


def polynomial(progress: float, section: OptimizerSection) -> float:
    """What is left of the run, to the power ``schedule_power``: 1 at first, 0 at the end."""
    return (1 - progress) ** section.schedule_power


SCHEDULES: Mapping[Schedule, Callable[[float, OptimizerSection], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
}
"""Name of a schedule -> factor at a share of the steps after the warm-up, from 0 up to 1, which is never reached."""
