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
    adds_noise: bool = False
    """Whether each step draws new noise, from the image's generator."""


SAMPLERS: Mapping[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(name="dpm++2m", a1111_name="DPM++ 2M", scheduler="DPMSolverMultistepScheduler"),
        Sampler(name="euler", a1111_name="Euler", scheduler="EulerDiscreteScheduler"),
        Sampler(name="euler-a", a1111_name="Euler a", scheduler="EulerAncestralDiscreteScheduler", adds_noise=True),
        Sampler(
            name="ddim",
            a1111_name="DDIM",
            scheduler="DDIMScheduler",
            options={"clip_sample": False, "set_alpha_to_one": False},
        ),
    )
}
"""Name -> sampler."""


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
