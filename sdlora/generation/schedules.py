"""The schedules of the steps: from a base's noise levels to those of a run. Reading this module imports no package.

A noise level is σ = √((1 - ᾱ) / ᾱ), the noise's standard deviation over the image's; a base has one for each timestep, which
grow with the timestep (Karras et al. 2022, table 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Spacing = Literal["linspace", "leading", "trailing"]
Levels = Callable[[Sequence[float], int], list[float]]
"""From noise levels, low to high, and a number of steps to as many levels, from high to low; the last step ends at 0."""
_RHO = 7.0
"""ρ of Karras et al. 2022: how far the steps lean to low noise."""
_ALIGN_YOUR_STEPS: Mapping[str, tuple[float, ...]] = {
    "sd1": (0.029, 0.152, 0.399, 0.652, 0.963, 1.396, 1.886, 2.697, 3.861, 6.475, 14.615),
    "sdxl": (0.029, 0.113, 0.234, 0.38, 0.555, 0.862, 1.342, 2.181, 3.771, 6.315, 14.615),
}
"""Family -> the noise levels between which ten steps go, optimised for SD 1.5 and SDXL (Sabour et al. 2024)."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the steps are spread over the noise levels: by diffusers' own spacing of timesteps, or by a formula."""

    name: str
    """Name in commands and requests."""
    a1111_name: str | None = None
    """A1111's schedule type with the same noise levels; None where it has none."""
    spacing: Spacing | None = None
    """``timestep_spacing`` of diffusers' schedulers."""
    levels: Levels | None = None
    """The formula, which is given the base's noise levels, or those that were published."""
    published: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Family -> noise levels that were published for it, from low to high."""
    aliases: tuple[str, ...] = ()
    """Further names with the same noise levels."""

    def levels_for(self, family: str) -> Levels | None:
        """``levels`` on a base of ``family``; families for which nothing was published have what SD 1.x has, as in A1111."""
        formula = self.levels
        if formula is None or not self.published:
            return formula
        table = self.published.get(family, self.published["sd1"])
        return lambda _, steps: formula(table, steps)


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


def kl_optimal(table: Sequence[float], steps: int) -> list[float]:
    """Equal strides of arctan σ (Sabour et al. 2024): ComfyUI's ``kl_optimal_scheduler``."""
    return [math.tan(angle) for angle in _linspace(math.atan(table[-1]), math.atan(table[0]), steps)]


SCHEDULES: Mapping[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule(name="karras", a1111_name="Karras", levels=karras, aliases=("ka",)),
        Schedule(name="exponential", a1111_name="Exponential", levels=exponential, aliases=("polyexponential",)),
        Schedule(name="uniform", a1111_name="Uniform", levels=uniform, aliases=("normal",)),
        Schedule(name="sgm-uniform", a1111_name="SGM Uniform", levels=sgm_uniform),
        Schedule(name="simple", a1111_name="Simple", levels=simple),
        Schedule(name="ddim", a1111_name="DDIM", levels=ddim, aliases=("ddim-uniform",)),
        # A1111 has both, with other noise levels at the end.
        Schedule(name="align-your-steps", levels=sgm_uniform, published=_ALIGN_YOUR_STEPS, aliases=("ays",)),
        Schedule(name="kl-optimal", levels=kl_optimal),
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


def _level_at(table: Sequence[float], timestep: float) -> float:
    """The noise level at a timestep, linear in log σ between whole ones: k-diffusion's ``t_to_sigma``."""
    low = min(int(timestep), len(table) - 2)
    share = timestep - low
    return math.exp((1 - share) * math.log(table[low]) + share * math.log(table[low + 1]))


def _linspace(first: float, last: float, count: int) -> list[float]:
    """``count`` values in equal strides; a single one is ``first``, the highest noise."""
    stride = (last - first) / max(count - 1, 1)
    return [first + stride * number for number in range(count)]
