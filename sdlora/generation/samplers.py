"""The samplers: one row each. Reading this table imports no package; diffusers is imported when a sampler is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..base.schedule import ScheduleFacts


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A way from noise to an image."""

    name: str
    """Name in commands and requests."""
    a1111_name: str
    """Name in image parameters, as A1111, Forge and Civitai write it."""
    scheduler: str
    """Name of the class in diffusers."""
    options: Mapping[str, bool] = field(default_factory=dict)
    """Arguments of the class that differ from its defaults."""
    a1111_schedules: Mapping[str | None, str] = field(default_factory=dict)
    """Spacing of the steps -> A1111's schedule type with the same noise levels; where it has none, nothing."""
    adds_noise: bool = False
    """Whether each step draws new noise, from the image's generator."""
    reads_sample: bool = True
    """Whether it works on bases that predict the image without noise."""


_EULER_SCHEDULES = {None: "Uniform", "linspace": "Uniform", "leading": "DDIM"}

SAMPLERS: Mapping[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            name="dpm++2m",
            a1111_name="DPM++ 2M",
            scheduler="DPMSolverMultistepScheduler",
            a1111_schedules={None: "SGM Uniform", "linspace": "SGM Uniform"},
        ),
        Sampler(
            name="euler",
            a1111_name="Euler",
            scheduler="EulerDiscreteScheduler",
            a1111_schedules=_EULER_SCHEDULES,
        ),
        Sampler(
            name="euler-a",
            a1111_name="Euler a",
            scheduler="EulerAncestralDiscreteScheduler",
            a1111_schedules=_EULER_SCHEDULES,
            adds_noise=True,
            reads_sample=False,
        ),
        Sampler(
            name="ddim",
            a1111_name="DDIM",
            scheduler="DDIMScheduler",
            options={"clip_sample": False, "set_alpha_to_one": False},
        ),
    )
}
"""Name -> sampler."""


def a1111_schedule(sampler: Sampler, schedule: ScheduleFacts, steps: int) -> str | None:
    """A1111's schedule type with the noise levels of ``make_scheduler``; None where it has none, and DDIM needs none.

    DPM++ 2M rounds timesteps to whole numbers, as diffusers does; A1111's SGM Uniform does not. A1111 takes another
    schedule for most samplers where none is stated.
    """
    if schedule.zero_terminal_snr or steps < 2:
        return None
    name = sampler.a1111_schedules.get(schedule.timestep_spacing)
    if name == "DDIM":
        # From timestep 1 on in whole strides: A1111 makes a step more where the strides leave room for one.
        stride = schedule.timesteps // steps
        same = schedule.steps_offset == 1 and stride > 0 and len(range(1, schedule.timesteps, stride)) == steps
        return name if same else None
    return name


def make_scheduler(sampler: Sampler, schedule: ScheduleFacts) -> Any:
    """A fresh diffusers scheduler of ``sampler`` over the base's own noise schedule."""
    import diffusers

    arguments: dict[str, Any] = {
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "num_train_timesteps": schedule.timesteps,
        "prediction_type": schedule.prediction,
        "steps_offset": schedule.steps_offset,
    }
    if schedule.zero_terminal_snr:
        # Only trailing spacing starts at the last timestep, which is pure noise (Lin et al. 2024, section 3.3).
        arguments |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif schedule.timestep_spacing is not None:
        arguments["timestep_spacing"] = schedule.timestep_spacing
    return getattr(diffusers, sampler.scheduler)(**arguments, **sampler.options)
