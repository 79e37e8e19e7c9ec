"""What ``[objective]`` changes, each setting against its own formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdlora.base.schedule import NoiseSchedule, Prediction, ScheduleFacts
from sdlora.config.sections import ObjectiveSection
from sdlora.training.metadata import training_metadata
from sdlora.training.objective import level_weights, penalties
from sdlora.training.session import TrainingSession
from tests.conftest import write_images
from tests.test_formats import configured, facts
from tests.training_runs import losses, session_for

LEVELS = torch.tensor([0, 1, 37, 250, 500, 750, 998, 999])


def schedule_for(prediction: Prediction, *, terminal: bool = False) -> tuple[NoiseSchedule, np.ndarray]:
    """Ours, and ᾱ at ``LEVELS`` in float64."""
    ours = NoiseSchedule.of(ScheduleFacts(prediction=prediction, zero_terminal_snr=terminal))
    return ours, ours.alphas_cumprod.double().numpy()[LEVELS.numpy()]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased", "none"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 5.0])
def test_noise_levels_are_weighted(prediction: Prediction, weighting: Any, gamma: float) -> None:
    ours, signal = schedule_for(prediction)
    snr = signal / (1 - signal)
    v = prediction == "v_prediction"
    # Weights of the denoised image's error, except for "debiased".
    of_image = {"min_snr": np.minimum(snr, gamma), "soft_min_snr": 1 / (1 / snr + 1 / gamma) if gamma else None}
    if weighting == "debiased":
        limited = np.minimum(snr, 1000)
        expected = 1 / (limited + 1) if v else limited**-0.5
    elif weighting == "none" or not gamma:
        expected = np.ones_like(snr)
    else:
        expected = of_image[weighting] / (snr + 1 if v else snr)
    section = ObjectiveSection(weighting=weighting, min_snr_gamma=gamma)
    weights = level_weights(LEVELS, ours, section)
    np.testing.assert_allclose(weights.double().numpy(), expected, rtol=1e-4)


def test_weights_are_finite_where_there_is_no_signal() -> None:
    ours, signal = schedule_for("v_prediction", terminal=True)
    assert signal[-1] == 0
    for weighting, last in (("min_snr", 0), ("soft_min_snr", 0), ("debiased", 1), ("none", 1)):
        weights = level_weights(LEVELS, ours, ObjectiveSection(weighting=weighting))  # ty: ignore[invalid-argument-type]
        assert weights.isfinite().all()
        assert weights[-1] == last


def penalty(errors: np.ndarray, signal: np.ndarray, loss: str, c: float, schedule: str) -> np.ndarray:
    """By kohya's formulas, in float64; ``errors`` and ``signal`` have a row for each of ``LEVELS``."""
    if loss == "l2":
        return errors**2
    with np.errstate(divide="ignore"):
        sigma = np.sqrt((1 - signal) / signal)
    thresholds = {
        "constant": np.full(len(signal), c),
        "exponential": np.exp(np.log(c) / 1000 * LEVELS.numpy()),
        "snr": (1 - c) / (1 + sigma) ** 2 + c,
    }
    c_of_row = thresholds[schedule].reshape(-1, 1, 1, 1)
    excess = 2 * (np.sqrt(errors**2 + c_of_row**2) - c_of_row)
    return excess * (c_of_row if loss == "huber" else 1)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("loss", ["l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("c", [0.1, 0.5])
def test_errors_are_measured(loss: Any, schedule: Any, c: float, terminal: bool) -> None:
    ours, signal = schedule_for("v_prediction", terminal=terminal)
    errors = np.random.default_rng(0).normal(size=(len(LEVELS), 4, 3, 2)) * 10.0 ** -np.arange(4).reshape(1, 4, 1, 1)
    given = torch.from_numpy(errors).float().requires_grad_()
    section = ObjectiveSection(loss=loss, huber_c=c, huber_schedule=schedule)
    costs = penalties(given, LEVELS, ours, section)
    np.testing.assert_allclose(costs.detach().double().numpy(), penalty(errors, signal, loss, c, schedule), rtol=1e-4)
    (gradient,) = torch.autograd.grad(costs.sum(), given)
    assert gradient.isfinite().all()


def session_in(folder: Path, base: Path, *more: str) -> TrainingSession:
    return session_for(base, write_images(folder / "set", 2), folder / "x.safetensors", *more)


@pytest.mark.parametrize(
    ("setting", "section"),
    [
        ("loss=huber", {"loss": "huber"}),
        ("loss=smooth_l1", {"loss": "smooth_l1"}),
        ("weighting=debiased", {"weighting": "debiased"}),
        ("weighting=soft_min_snr", {"weighting": "soft_min_snr"}),
        ("weighting=none", {"weighting": "none"}),
    ],
)
def test_a_step_counts_what_is_chosen(setting: str, section: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """The loss of a step is that of the section on the same draws, and not that of the defaults."""
    plain, chosen = session_in(tmp_path, tiny_base), session_in(tmp_path, tiny_base, f"objective.{setting}")
    (own,), (other,) = losses(chosen, 1), losses(plain, 1)
    assert own == pytest.approx(loss_of_first_step(chosen, ObjectiveSection(**section)), rel=1e-4)
    assert abs(own - other) > 1e-3 * other


@torch.no_grad()
def loss_of_first_step(session: TrainingSession, section: ObjectiveSection) -> float:
    """Of the UNet alone, by the formulas above in float64."""
    base, prepared = session.base, session._ahead.take(0)
    (inputs,) = prepared.parts(base.device, 100)
    signal = base.schedule.alphas_cumprod.double()[inputs.timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * inputs.latents + (1 - signal).sqrt() * inputs.noise
    context = session._conditioning(inputs).context
    predicted = base.unet(noisy.float(), inputs.timesteps, context, return_dict=False)[0].double()
    session._ahead.close()
    errors = (predicted - inputs.noise).numpy()
    level = signal.flatten().numpy()
    snr, sigma = level / (1 - level), np.sqrt((1 - level) / level)
    c = ((1 - section.huber_c) / (1 + sigma) ** 2 + section.huber_c).reshape(-1, 1, 1, 1)
    excess = 2 * (np.sqrt(errors**2 + c**2) - c)
    costs = {"l2": errors**2, "huber": c * excess, "smooth_l1": excess}[section.loss].mean((1, 2, 3))
    weights = {
        "min_snr": np.minimum(snr, 5) / snr,
        "soft_min_snr": 5 / (snr + 5),
        "debiased": snr**-0.5,
        "none": np.ones_like(snr),
    }[section.weighting]
    return float((costs * weights).mean())


def test_the_file_states_the_loss_and_the_weighting() -> None:
    def stated(*settings: str) -> dict[str, str]:
        metadata = training_metadata(configured(*settings), *facts())
        keys = ("loss_type", "huber_schedule", "huber_scale", "huber_c", "min_snr_gamma", "debiased_estimation")
        return {key: metadata[f"ss_{key}"] for key in keys}

    assert list(stated().values()) == ["l2", "None", "None", "None", "5.0", "False"]
    huber = stated("objective.loss=huber", "objective.huber_c=0.3", "objective.huber_schedule=constant")
    assert list(huber.values()) == ["huber", "constant", "1.0", "0.3", "5.0", "False"]
    assert list(stated("objective.weighting=debiased").values())[-2:] == ["None", "True"]
    assert list(stated("objective.weighting=soft_min_snr").values())[-2:] == ["None", "False"]
    assert list(stated("objective.min_snr_gamma=0").values())[-2:] == ["None", "False"]
