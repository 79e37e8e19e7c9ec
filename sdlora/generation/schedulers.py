"""Schedulers of diffusers and of our own, set up for a base, a schedule and a number of steps."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import torch

from ..base.schedule import NoiseSchedule, ScheduleFacts
from .own_schedulers import OWN_SCHEDULERS, noise_levels
from .samplers import SPACINGS, Sampler, a1111_spacing
from .schedules import SCHEDULES, Levels, Schedule

_ALMOST_NO_SIGNAL = 2.0**-24
"""ᾱ that diffusers takes for 0 at the last timestep of zero-terminal SNR, so that σ is finite."""


def make_scheduler(
    sampler: Sampler, facts: ScheduleFacts, steps: int, schedule: str | None = None, *, family: str = "sd1"
) -> Any:
    """A fresh diffusers scheduler of ``sampler`` over the base's own noise schedule, set to ``steps``, on the CPU.

    Its ``order`` is the number of calls of the UNet for a step. Of schedules with a formula, diffusers' own spacing is
    taken where A1111 gives it the same name: images and their recipes then agree. ``family`` is the name of the base's, for
    schedules that were published for a family.
    """
    chosen = None if schedule is None else SCHEDULES[schedule]
    spacing = facts.timestep_spacing if chosen is None else chosen.spacing
    if facts.zero_terminal_snr and chosen is None:
        # Only trailing spacing starts at the last timestep, which is pure noise (Lin et al. 2024, section 3.3).
        spacing = "trailing"
    if chosen is not None and chosen.levels is not None:
        same = _spacing_named(chosen, sampler, facts, steps)
        if same is not None:
            chosen, spacing = None, same
    levels = None if chosen is None else chosen.levels_for(family)
    option = "exponential" if chosen is not None and chosen.name == "exponential" else "karras"
    return _scheduler(sampler, facts, steps, spacing=spacing, levels=levels, option=option)


def _spacing_named(schedule: Schedule, sampler: Sampler, facts: ScheduleFacts, steps: int) -> str | None:
    if schedule.a1111_name is None:
        return None
    names = {spacing: a1111_spacing(sampler, facts, steps, spacing) for spacing in SPACINGS}
    return next((spacing for spacing, name in names.items() if name == schedule.a1111_name), None)


def _scheduler(
    sampler: Sampler, facts: ScheduleFacts, steps: int, *, spacing: str | None, levels: Levels | None, option: str
) -> Any:
    """The scheduler of ``sampler`` with its timesteps set.

    ``levels`` replaces the formula of diffusers' option ``use_{option}_sigmas``, which decides how timesteps are rounded.
    """
    made = OWN_SCHEDULERS.get(sampler.name) or getattr(diffusers, sampler.scheduler)
    arguments: dict[str, Any] = {
        "beta_start": facts.beta_start,
        "beta_end": facts.beta_end,
        "beta_schedule": facts.beta_schedule,
        "num_train_timesteps": facts.timesteps,
        "prediction_type": facts.prediction,
        "steps_offset": facts.steps_offset,
    }
    takes = inspect.signature(made.__init__).parameters
    if facts.zero_terminal_snr:
        if "rescale_betas_zero_snr" in takes:
            arguments["rescale_betas_zero_snr"] = True
        else:
            arguments["trained_betas"] = _zero_snr_betas(facts)
    if levels is not None:
        spacing = "linspace"
        arguments |= {f"use_{option}_sigmas": True} if f"use_{option}_sigmas" in takes else {}
    if spacing is not None:
        arguments["timestep_spacing"] = spacing
    scheduler = made(**arguments, **sampler.options)
    if levels is not None:
        chosen = np.array(levels(noise_levels(scheduler), steps))
        setattr(scheduler, f"_convert_to_{option}", lambda **_: chosen)
    scheduler.set_timesteps(steps, device="cpu")
    return scheduler


def _zero_snr_betas(facts: ScheduleFacts) -> list[float]:
    signal = NoiseSchedule.of(facts).alphas_cumprod.double()
    signal[-1] = _ALMOST_NO_SIGNAL
    return (1 - signal / torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])).tolist()
