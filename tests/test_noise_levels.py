"""The noise levels of every sampler against A1111's and k-diffusion's formulas, written down here in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules

from sdlora.base.schedule import ScheduleFacts
from sdlora.generation.samplers import SAMPLERS, a1111_schedule
from sdlora.generation.schedulers import make_scheduler
from sdlora.generation.schedules import SCHEDULES

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
SIGMAS = ((1 - np.cumprod(1 - BETAS)) / np.cumprod(1 - BETAS)) ** 0.5


def t_to_sigma(t: np.ndarray) -> np.ndarray:
    """k-diffusion's DiscreteSchedule.t_to_sigma: linear between the logarithms of neighbours."""
    return np.exp(np.interp(t, np.arange(1000), np.log(SIGMAS)))


def uniform(steps: int) -> np.ndarray:
    """k-diffusion's get_sigmas: A1111's Uniform."""
    return np.append(t_to_sigma(np.linspace(999, 0, steps)), 0)


def sgm_uniform(steps: int) -> np.ndarray:
    """A1111's sgm_uniform."""
    return np.append(t_to_sigma(np.linspace(999, 0, steps + 1)[:-1]), 0)


def ddim(steps: int) -> np.ndarray:
    """A1111's ddim_scheduler."""
    return np.append(SIGMAS[1 :: max(1000 // steps, 1)][::-1], 0)


def karras(steps: int, rho: float = 7.0) -> np.ndarray:
    """k-diffusion's get_sigmas_karras, which A1111 takes for DPM++ 2M where no schedule is stated."""
    ramp, low, high = np.linspace(0, 1, steps), SIGMAS[0] ** (1 / rho), SIGMAS[-1] ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, 0)


def exponential(steps: int) -> np.ndarray:
    """k-diffusion's get_sigmas_exponential."""
    return np.append(np.exp(np.linspace(np.log(SIGMAS[-1]), np.log(SIGMAS[0]), steps)), 0)


def simple(steps: int) -> np.ndarray:
    """A1111's simple_scheduler."""
    return np.append([SIGMAS[-(1 + int(x * len(SIGMAS) / steps))] for x in range(steps)], 0)


def align_your_steps(steps: int, published: str = "StableDiffusionSigmas") -> np.ndarray:
    """ComfyUI's AlignYourStepsScheduler: NVIDIA's interpolation of the published levels, the last of which becomes 0."""
    known = np.array([*AysSchedules[published][:-1], 0.029])
    spread = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(known)), np.log(known[::-1]))
    return np.append(np.exp(spread)[::-1][:-1], 0)


def kl_optimal(steps: int) -> np.ndarray:
    """ComfyUI's kl_optimal_scheduler."""
    share = np.arange(steps) / (steps - 1)
    return np.append(np.tan(share * np.arctan(SIGMAS[0]) + (1 - share) * np.arctan(SIGMAS[-1])), 0)


FORMULAS = {"Uniform": uniform, "SGM Uniform": sgm_uniform, "DDIM": ddim, "Karras": karras}
PAIRS = [
    *(("dpm++2m", None, steps, "SGM Uniform") for steps in (2, 10, 20, 27, 50)),
    *(("dpm++2m", "linspace", steps, "SGM Uniform") for steps in (9, 37)),
    *((name, None, steps, "Uniform") for name in ("euler", "euler-a") for steps in (2, 10, 20, 27, 50)),
    *((name, "leading", steps, "DDIM") for name in ("euler", "euler-a") for steps in (5, 10, 20, 25, 50)),
]


def levels(sampler: str, spacing: str | None, steps: int) -> np.ndarray:
    scheduler = make_scheduler(SAMPLERS[sampler], ScheduleFacts(timestep_spacing=spacing), steps)
    return scheduler.sigmas.double().numpy()


@pytest.mark.parametrize(("sampler", "spacing", "steps", "name"), PAIRS)
def test_the_stated_schedule_has_our_noise_levels(sampler: str, spacing: str | None, steps: int, name: str) -> None:
    assert a1111_schedule(SAMPLERS[sampler], ScheduleFacts(timestep_spacing=spacing), steps) == name
    ours, expected = levels(sampler, spacing, steps), FORMULAS[name](steps)
    assert ours.shape == expected.shape
    assert (ours[-1], expected[-1]) == (0, 0)
    if name == "SGM Uniform":  # diffusers rounds each timestep to a whole one.
        exact = np.linspace(999, 0, steps + 1)[:-1]
        np.testing.assert_allclose(ours[:-1], t_to_sigma(np.round(exact)), rtol=2e-5)
        np.testing.assert_allclose(np.interp(ours[:-1], SIGMAS, np.arange(1000)), exact, atol=0.51)
    else:
        np.testing.assert_allclose(ours, expected, rtol=2e-4)
    assert not np.allclose(ours, karras(steps), rtol=0.02) or steps == 2


CHOSEN = FORMULAS | {"Exponential": exponential, "Simple": simple}
CHOSEN |= {"align-your-steps": align_your_steps, "kl-optimal": kl_optimal}
ABLE = [name for name, sampler in SAMPLERS.items() if "karras" in sampler.schedules]


@pytest.mark.parametrize("sampler", ABLE)
@pytest.mark.parametrize("schedule", [name for name, schedule in SCHEDULES.items() if schedule.levels])
def test_a_requested_schedule_has_the_noise_levels_of_a1111_or_comfyui(sampler: str, schedule: str) -> None:
    name = SCHEDULES[schedule].a1111_name
    for steps in (2, 10, 20, 25):
        scheduler = make_scheduler(SAMPLERS[sampler], ScheduleFacts(), steps, schedule)
        # Of samplers with two calls for a step, the levels of the first calls: diffusers repeats them, or ours are between.
        ours = scheduler.sigmas.double().numpy()
        if scheduler.order == 2:
            ours = np.append(ours[0 : 2 * steps - 1 : 2], 0)
        rounded = schedule == "sgm-uniform" and SAMPLERS[sampler].a1111_schedules[None] == "SGM Uniform"
        np.testing.assert_allclose(ours, CHOSEN[name or schedule](steps), rtol=5e-3 if rounded else 2e-4)
        assert a1111_schedule(SAMPLERS[sampler], ScheduleFacts(), steps, schedule) == name
        # Each timestep is that of its noise level, for diffusers to the nearest whole one, or the one below.
        exact = np.interp(np.log(ours[:-1]), np.log(SIGMAS), np.arange(1000))
        timesteps = scheduler.timesteps.double().numpy()
        timesteps = timesteps[0::2] if scheduler.order == 2 else timesteps
        whole = sampler in ("dpm++2m", "dpm++2m-sde", "dpm++3m-sde", "unipc", "dpm2")
        np.testing.assert_allclose(timesteps, exact, atol=1.0 if whole else 2e-2)


@pytest.mark.parametrize("sampler", ABLE)
def test_a_single_step_starts_at_the_highest_noise(sampler: str) -> None:
    for schedule in (name for name, schedule in SCHEDULES.items() if schedule.levels and name != "ddim"):
        sigmas = make_scheduler(SAMPLERS[sampler], ScheduleFacts(), 1, schedule).sigmas.tolist()
        assert sigmas[0] == pytest.approx(SIGMAS[-1], rel=1e-4)
        assert sigmas[-1] == 0


@pytest.mark.parametrize(
    ("family", "published"),
    [("sd1", "StableDiffusionSigmas"), ("sd2", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas")],
)
def test_align_your_steps_is_that_of_the_family(family: str, published: str) -> None:
    def levels(steps: int) -> np.ndarray:
        scheduler = make_scheduler(SAMPLERS["euler"], ScheduleFacts(), steps, "align-your-steps", family=family)
        return scheduler.sigmas.double().numpy()

    np.testing.assert_allclose(levels(10), AysSchedules[published], rtol=1e-6)
    for steps in (2, 7, 25):
        np.testing.assert_allclose(levels(steps), align_your_steps(steps, published), rtol=1e-6)


def test_what_names_the_default_is_the_default() -> None:
    """So an image and its recipe agree to the last bit."""
    for sampler, spacing, steps, name in PAIRS:
        schedule = next(key for key, row in SCHEDULES.items() if row.a1111_name == name)
        facts = ScheduleFacts(timestep_spacing=spacing)
        usual, named = (make_scheduler(SAMPLERS[sampler], facts, steps, choice) for choice in (None, schedule))
        assert named.sigmas.tolist() == usual.sigmas.tolist()
        assert named.timesteps.tolist() == usual.timesteps.tolist()
        assert float(named.init_noise_sigma) == float(usual.init_noise_sigma)


@pytest.mark.parametrize(("schedule", "spacing"), [("leading", "leading"), ("trailing", "trailing")])
def test_spacings_that_a1111_has_no_name_for(schedule: str, spacing: str) -> None:
    for sampler in ("dpm++2m", "ddim", "unipc"):
        ours = make_scheduler(SAMPLERS[sampler], ScheduleFacts(), 20, schedule)
        base = make_scheduler(SAMPLERS[sampler], ScheduleFacts(timestep_spacing=spacing), 20)
        assert ours.timesteps.tolist() == base.timesteps.tolist()
        assert a1111_schedule(SAMPLERS[sampler], ScheduleFacts(), 20, schedule) is None


def test_ddim_visits_the_timesteps_of_a1111() -> None:
    for steps in (5, 10, 20, 25, 50):
        scheduler = make_scheduler(SAMPLERS["ddim"], ScheduleFacts(), steps)
        assert scheduler.timesteps.tolist() == [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]
        assert a1111_schedule(SAMPLERS["ddim"], ScheduleFacts(), steps) is None


@pytest.mark.parametrize(
    ("sampler", "facts", "steps"),
    [
        ("euler", {"timestep_spacing": "leading"}, 30),
        ("euler", {"timestep_spacing": "leading", "steps_offset": 0}, 20),
        ("euler", {"timestep_spacing": "trailing"}, 20),
        ("dpm++2m", {"timestep_spacing": "leading"}, 20),
        ("dpm++2m", {"zero_terminal_snr": True}, 20),
        ("euler", {}, 1),
    ],
)
def test_what_a1111_has_no_name_for_is_left_out(sampler: str, facts: dict[str, object], steps: int) -> None:
    schedule = ScheduleFacts(**facts)  # ty: ignore[invalid-argument-type]
    assert a1111_schedule(SAMPLERS[sampler], schedule, steps) is None
    scheduler = make_scheduler(SAMPLERS[sampler], schedule, steps)
    ours = scheduler.sigmas.double().numpy()
    assert all(high > low for high, low in pairwise(ours))
    for formula in FORMULAS.values():
        expected = formula(steps)
        assert ours.shape != expected.shape or not np.allclose(ours, expected, rtol=1e-3)
