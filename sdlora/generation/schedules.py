"""The schedules of the steps: from a base's noise levels to those of a run. Reading this module imports no package.

A noise level is σ = √((1 - ᾱ) / ᾱ), the noise's standard deviation over the image's; a base has one for each timestep, which
grow with the timestep (Karras et al. 2022, table 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Spacing = Literal["linspace", "leading", "trailing"]
_RHO = 7.0
"""ρ of Karras et al. 2022: how far the steps lean to low noise."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the steps are spread over the noise levels: by diffusers' own spacing of timesteps, or by a formula."""

    name: str
    """Name in commands and requests."""
    a1111_name: str | None = None
    """A1111's schedule type; None where it has none."""
    spacing: Spacing | None = None
    """``timestep_spacing`` of diffusers' schedulers."""
    levels: Callable[[Sequence[float], int], list[float]] | None = None
    """From the base's noise levels and a number of steps to as many levels, from high to low; the last step ends at 0."""
    aliases: tuple[str, ...] = ()
    """Further names with the same noise levels."""


def uniform(table: Sequence[float], steps: int) -> list[float]:
    """Timesteps in equal strides from the last to the first: k-diffusion's ``get_sigmas``."""
    return [_level_at(table, timestep) for timestep in _linspace(len(table) - 1, 0, steps)]


def sgm_uniform(table: Sequence[float], steps: int) -> list[float]:
    """As ``uniform`` with a step more, the last of which is left out: it goes from above the first timestep to 0."""
    return [_level_at(table, timestep) for timestep in _linspace(len(table) - 1, 0, steps + 1)[:-1]]


def karras(table: Sequence[float], steps: int) -> list[float]:
    """(σₘₐₓ^(1/ρ) + i / (n - 1) (σₘᵢₙ^(1/ρ) - σₘₐₓ^(1/ρ)))^ρ with ρ = 7 (Karras et al. 2022, eq. 5)."""
    return [root**_RHO for root in _linspace(table[-1] ** (1 / _RHO), table[0] ** (1 / _RHO), steps)]


def exponential(table: Sequence[float], steps: int) -> list[float]:
    """Equal strides of log σ: k-diffusion's ``get_sigmas_exponential``."""
    return [math.exp(value) for value in _linspace(math.log(table[-1]), math.log(table[0]), steps)]


def ddim(table: Sequence[float], steps: int) -> list[float]:
    """Whole strides of timesteps from the second on: A1111's ``ddim_scheduler``, without the step that it may add."""
    stride = max(len(table) // steps, 1)
    return [table[min(1 + stride * number, len(table) - 1)] for number in reversed(range(steps))]


def simple(table: Sequence[float], steps: int) -> list[float]:
    """Timesteps in equal strides from the last on, rounded: ComfyUI's and A1111's ``simple_scheduler``."""
    return [table[-(1 + int(number * len(table) / steps))] for number in range(steps)]


SCHEDULES: Mapping[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule(name="karras", a1111_name="Karras", levels=karras, aliases=("ka",)),
        Schedule(name="exponential", a1111_name="Exponential", levels=exponential, aliases=("polyexponential",)),
        Schedule(name="uniform", a1111_name="Uniform", levels=uniform, aliases=("normal",)),
        Schedule(name="sgm-uniform", a1111_name="SGM Uniform", levels=sgm_uniform),
        Schedule(name="simple", a1111_name="Simple", levels=simple),
        Schedule(name="ddim", a1111_name="DDIM", levels=ddim, aliases=("ddim-uniform",)),
        Schedule(name="linspace", spacing="linspace"),
        Schedule(name="leading", spacing="leading"),
        Schedule(name="trailing", spacing="trailing"),
    )
}
"""Name -> schedule."""


def plain(name: str) -> str:
    """``name`` as it is compared: small letters and digits, with p for +, so ``DPM++ 2M`` equals ``dpmpp_2m``."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


SCHEDULE_NAMES: Mapping[str, str] = {
    plain(alias): schedule.name for schedule in SCHEDULES.values() for alias in (schedule.name, *schedule.aliases)
}
"""Plain name or alias -> name."""


def timestep_of(table: Sequence[float], level: float) -> float:
    """The timestep of a noise level, linear in log σ between whole ones: k-diffusion's ``sigma_to_t``."""
    if level <= table[0]:
        return 0.0
    for number, (low, high) in enumerate(pairwise(table)):
        if level <= high:
            return number + (math.log(level) - math.log(low)) / (math.log(high) - math.log(low))
    return len(table) - 1.0


def _level_at(table: Sequence[float], timestep: float) -> float:
    """The noise level at a timestep, linear in log σ between whole ones: k-diffusion's ``t_to_sigma``."""
    low = min(int(timestep), len(table) - 2)
    share = timestep - low
    return math.exp((1 - share) * math.log(table[low]) + share * math.log(table[low + 1]))


def _linspace(first: float, last: float, count: int) -> list[float]:
    """``count`` values in equal strides; a single one is ``first``, the highest noise."""
    stride = (last - first) / max(count - 1, 1)
    return [first + stride * number for number in range(count)]
