"""The samplers: one row each. Reading this table imports no package; ``schedulers`` makes what it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ..errors import SdloraError
from .schedules import SCHEDULE_NAMES, SCHEDULES, plain

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
    aliases: tuple[str, ...] = ()
    """Further names: k-diffusion's, ComfyUI's and kohya's."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Arguments of the class that differ from its defaults."""
    step_options: Mapping[str, float] = field(default_factory=dict)
    """Arguments of a step that differ from its defaults."""
    a1111_schedules: Mapping[str | None, str] = field(default_factory=dict)
    """Spacing of the steps -> A1111's schedule type with the same noise levels; where it has none, nothing."""
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    """Names of the schedules that it can follow."""
    most_steps: int | None = None
    """The most steps that it can make."""
    adds_noise: bool = False
    """Whether each step draws new noise, from the image's generator."""
    reads_sample: bool = True
    """Whether it works on bases that predict the image without noise."""


_EULER_SCHEDULES = {None: "Uniform", "linspace": "Uniform", "leading": "DDIM"}
_MULTISTEP_SCHEDULES = {None: "SGM Uniform", "linspace": "SGM Uniform"}
SPACINGS = tuple(schedule.name for schedule in SCHEDULES.values() if schedule.spacing is not None)

SAMPLERS: Mapping[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            name="dpm++2m",
            a1111_name="DPM++ 2M",
            scheduler="DPMSolverMultistepScheduler",
            aliases=("dpmsolver++",),
            a1111_schedules=_MULTISTEP_SCHEDULES,
        ),
        Sampler(
            name="dpm++2m-sde",
            a1111_name="DPM++ 2M SDE",
            scheduler="DPMSolverMultistepScheduler",
            aliases=("dpmpp_2m_sde_gpu",),
            options={"algorithm_type": "sde-dpmsolver++"},
            a1111_schedules=_MULTISTEP_SCHEDULES,
            adds_noise=True,
        ),
        Sampler(
            name="dpm++3m-sde",
            a1111_name="DPM++ 3M SDE",
            scheduler="DPMSolverMultistepScheduler",
            aliases=("dpmpp_3m_sde_gpu",),
            options={"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            a1111_schedules=_MULTISTEP_SCHEDULES,
            adds_noise=True,
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
            aliases=("euler_ancestral",),
            a1111_schedules=_EULER_SCHEDULES,
            adds_noise=True,
            reads_sample=False,
        ),
        Sampler(
            name="heun",
            a1111_name="Heun",
            scheduler="HeunDiscreteScheduler",
            a1111_schedules=_EULER_SCHEDULES,
            reads_sample=False,
        ),
        Sampler(
            name="dpm2",
            a1111_name="DPM2",
            scheduler="KDPM2DiscreteScheduler",
            aliases=("dpm_2",),
            a1111_schedules=_EULER_SCHEDULES,
            reads_sample=False,
        ),
        Sampler(
            name="dpm2-a",
            a1111_name="DPM2 a",
            scheduler="KDPM2AncestralDiscreteScheduler",
            aliases=("dpm_2_ancestral",),
            a1111_schedules=_EULER_SCHEDULES,
            adds_noise=True,
        ),
        Sampler(
            name="lms",
            a1111_name="LMS",
            scheduler="LMSDiscreteScheduler",
            a1111_schedules=_EULER_SCHEDULES,
        ),
        Sampler(
            name="dpm++sde",
            a1111_name="DPM++ SDE",
            scheduler="DPMSolverSDEScheduler",
            aliases=("dpmpp_sde_gpu",),
            a1111_schedules=_EULER_SCHEDULES,
            adds_noise=True,
        ),
        Sampler(
            name="dpm++2s-a",
            a1111_name="DPM++ 2S a",
            scheduler="DPMSolver2SAncestralScheduler",
            aliases=("dpmpp_2s_ancestral",),
            a1111_schedules=_EULER_SCHEDULES,
            adds_noise=True,
        ),
        Sampler(
            name="unipc",
            a1111_name="UniPC",
            scheduler="UniPCMultistepScheduler",
            aliases=("uni_pc_bh2",),
            a1111_schedules=_MULTISTEP_SCHEDULES,
        ),
        Sampler(
            name="ddim",
            a1111_name="DDIM",
            scheduler="DDIMScheduler",
            options={"clip_sample": False, "set_alpha_to_one": False},
            schedules=SPACINGS,
        ),
        Sampler(
            name="lcm",
            a1111_name="LCM",
            scheduler="LCMScheduler",
            options={"set_alpha_to_one": False},
            schedules=(),
            most_steps=50,
            adds_noise=True,
        ),
        Sampler(
            name="tcd",
            a1111_name="TCD",
            scheduler="TCDScheduler",
            options={"set_alpha_to_one": False},
            step_options={"eta": 0.3},
            schedules=(),
            most_steps=50,
            adds_noise=True,
        ),
    )
}
"""Name -> sampler."""

_NAMES = {
    plain(name): sampler.name
    for sampler in SAMPLERS.values()
    for name in (sampler.name, sampler.a1111_name, sampler.scheduler, *sampler.aliases)
    # Several samplers are settings of one class of diffusers: its name is that of the first.
    if name != sampler.scheduler or sampler is next(s for s in SAMPLERS.values() if s.scheduler == name)
}
"""Plain name -> name of the sampler."""


def read_sampler(sampler: str, schedule: str | None = None) -> tuple[str, str | None]:
    """Names of ``SAMPLERS`` and ``SCHEDULES`` for what A1111, ComfyUI, kohya's trainer or diffusers call them.

    ``DPM++ 2M Karras`` names both. What is not known stays as it is, for ``sampler_problems`` to report.

    Raises:
        SdloraError: ``sampler`` names a schedule other than ``schedule``.
    """
    known = None if schedule is None else SCHEDULE_NAMES.get(plain(schedule), schedule)
    name = plain(sampler)
    # The names of k-diffusion's samplers may begin with a k.
    for short in (name, name.removeprefix("k")):
        if short in _NAMES:
            return _NAMES[short], known
        for ending, named in SCHEDULE_NAMES.items():
            if short.endswith(ending) and (found := _NAMES.get(short.removesuffix(ending))):
                if known not in (None, named):
                    raise SdloraError(
                        f"sampler {sampler!r} names another schedule than {schedule!r}; state one of them"
                    )
                return found, named
    return sampler, known


def sampler_problems(sampler: str, schedule: str | None, steps: int, facts: ScheduleFacts) -> list[str]:
    """One line for each name that is not known, or that does not go with the others or with the base's noise schedule."""
    row, problems = SAMPLERS.get(sampler), []
    chosen = None if schedule is None else SCHEDULES.get(schedule)
    if row is None:
        near = get_close_matches(plain(sampler), _NAMES, n=1)
        hint = f"did you mean {_NAMES[near[0]]!r}? Otherwise choose" if near else "choose"
        problems.append(f"sampler {sampler!r} is unknown; {hint} one of {', '.join(SAMPLERS)}")
    if schedule is not None and chosen is None:
        near = get_close_matches(plain(schedule), SCHEDULE_NAMES, n=1)
        hint = f"did you mean {SCHEDULE_NAMES[near[0]]!r}? Otherwise choose" if near else "choose"
        problems.append(f"schedule {schedule!r} is unknown; {hint} one of {', '.join(SCHEDULES)}")
    if row is None:
        return problems
    if facts.prediction == "sample" and not row.reads_sample:
        able = ", ".join(name for name, other in SAMPLERS.items() if other.reads_sample)
        problems.append(f"sampler {sampler!r} does not work on a base that predicts the image; choose one of {able}")
    if row.most_steps is not None and steps > row.most_steps:
        problems.append(f"steps {steps}: sampler {sampler!r} makes at most {row.most_steps}")
    if chosen is not None and schedule not in row.schedules:
        able = (
            f"choose one of {', '.join(row.schedules)}" if row.schedules else "it has its own; leave the schedule out"
        )
        problems.append(f"schedule {schedule!r} does not work with sampler {sampler!r}; {able}")
    elif chosen is not None and chosen.published and facts.zero_terminal_snr:
        problems.append(
            f"schedule {schedule!r} was published for bases without zero-terminal SNR, and this one has to start from pure "
            "noise; choose karras or trailing"
        )
    return problems


def a1111_schedule(sampler: Sampler, facts: ScheduleFacts, steps: int, schedule: str | None = None) -> str | None:
    """A1111's schedule type with the noise levels of ``make_scheduler``; None where it has none, and DDIM needs none.

    DPM++ 2M rounds timesteps to whole numbers, as diffusers does; A1111's SGM Uniform does not. A1111 takes another
    schedule for most samplers where none is stated.
    """
    chosen = None if schedule is None else SCHEDULES[schedule]
    if chosen is not None and chosen.levels is not None:
        return chosen.a1111_name if chosen.name != "ddim" or _strides_fit(facts, steps) else None
    return a1111_spacing(sampler, facts, steps, None if chosen is None else chosen.spacing)


def a1111_spacing(sampler: Sampler, facts: ScheduleFacts, steps: int, spacing: str | None) -> str | None:
    """As ``a1111_schedule``, of one of diffusers' spacings; None is that of the base, or else of the sampler."""
    if facts.zero_terminal_snr or steps < 2:
        return None
    name = sampler.a1111_schedules.get(spacing or facts.timestep_spacing)
    # From timestep 1 on in whole strides.
    return name if name != "DDIM" or (facts.steps_offset == 1 and _strides_fit(facts, steps)) else None


def _strides_fit(facts: ScheduleFacts, steps: int) -> bool:
    """Whether A1111's DDIM schedule has ``steps`` steps: it makes one more where the strides leave room for it."""
    stride = facts.timesteps // steps
    return stride > 0 and len(range(1, facts.timesteps, stride)) == steps
