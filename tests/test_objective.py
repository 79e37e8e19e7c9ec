"""What ``[objective]`` changes, each setting against its own formula in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdlora.base.base import Base
from sdlora.base.conditioning import time_ids
from sdlora.base.schedule import NoiseSchedule, Prediction, ScheduleFacts
from sdlora.config.sections import ObjectiveSection
from sdlora.errors import ConfigError
from sdlora.progress import Silence
from sdlora.randomness import Stream, generator
from sdlora.training.batches import Draws, draw
from sdlora.training.course import own_losses
from sdlora.training.loss import denoising_loss
from sdlora.training.metadata import training_metadata
from sdlora.training.objective import level_weights, penalties, timestep_at
from sdlora.training.plan import plan_config
from sdlora.training.session import TrainingSession
from sdlora.training.validation import validation_loss
from tests.conftest import write_images
from tests.test_formats import configured, facts
from tests.training_runs import config_for, losses, session_for, toml

LEVELS = torch.tensor([0, 1, 37, 250, 500, 750, 998, 999])


def schedule_for(prediction: Prediction, *, terminal: bool = False) -> tuple[NoiseSchedule, np.ndarray]:
    """Ours, and ᾱ at ``LEVELS`` in float64."""
    ours = NoiseSchedule.of(ScheduleFacts(prediction=prediction, zero_terminal_snr=terminal))
    return ours, ours.alphas_cumprod.double().numpy()[LEVELS.numpy()]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased", "none"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 5.0])
def test_noise_levels_are_weighted(prediction: Prediction, weighting: Any, gamma: float) -> None:
    ours, signal = schedule_for(prediction)
    snr = signal / (1 - signal)
    of_prediction = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones_like(snr)}[prediction]
    # Weights of the denoised image's error, except for "debiased".
    of_image = {"min_snr": np.minimum(snr, gamma), "soft_min_snr": 1 / (1 / snr + 1 / gamma) if gamma else None}
    if weighting == "debiased":
        limited = np.minimum(snr, 1000)
        expected = {"epsilon": limited**-0.5, "v_prediction": 1 / (limited + 1), "sample": limited**0.5}[prediction]
    elif weighting == "none" or not gamma:
        expected = np.ones_like(snr)
    else:
        expected = of_image[weighting] / of_prediction
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
        ("input_perturbation=0.5", {"input_perturbation": 0.5}),
        ("multires_noise_iterations=6", {"multires_noise_iterations": 6}),
        ("noise_offset=0.5", {"noise_offset": 0.5}),
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
    extra = [
        generator(0, Stream.INPUT_PERTURBATION, 0, slot).standard_normal((4, 8, 8), np.float32) for slot in range(2)
    ]
    noise = inputs.noise + section.input_perturbation * torch.from_numpy(np.stack(extra))
    noisy = signal.sqrt() * inputs.latents + (1 - signal).sqrt() * noise
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


def drawn(
    slot: int = 0, *, slots: int = 1, step: int = 0, shape: tuple[int, ...] = (4, 12, 10), **section: Any
) -> Draws:
    return draw(
        seed=0, step=step, slot=slot, slots=slots, shape=shape, timesteps=1000, caption_dropout=0.0,
        objective=ObjectiveSection(**section),
    )  # fmt: skip


def test_offset_noise_shifts_each_channel() -> None:
    plain, offset = drawn().noise, drawn(noise_offset=0.3).noise
    shifts = offset - plain
    assert offset.dtype == np.float32
    np.testing.assert_allclose(shifts, np.broadcast_to(shifts[:, :1, :1], shifts.shape), atol=1e-6)
    assert not np.array_equal(shifts, (drawn(step=1, noise_offset=0.3).noise - drawn(step=1).noise))
    many = np.array(
        [(drawn(step=step, noise_offset=0.3).noise - drawn(step=step).noise)[:, 0, 0] for step in range(500)]
    )
    assert abs(many.mean()) < 0.03
    assert many.std() == pytest.approx(0.3, rel=0.05)
    # Channels differ from each other, and from the noise.
    assert np.abs(np.corrcoef(many.T) - np.eye(4)).max() < 0.15


@pytest.mark.parametrize("shape", [(4, 24, 40), (4, 8, 8), (4, 3, 1)])
@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.3), (6, 0.4), (10, 0.8)])
def test_multires_noise_adds_coarser_noise(shape: tuple[int, int, int], iterations: int, discount: float) -> None:
    """Against torch's own enlargement in float64, on the same draws."""
    options = {"multires_noise_iterations": iterations, "multires_noise_discount": discount}
    total = torch.from_numpy(drawn(shape=shape).noise).double()[None]
    rng = generator(0, Stream.MULTIRES_NOISE, 0, 0)
    for number in range(iterations):
        ratio = rng.random() * 2 + 2
        high, wide = (max(1, int(side / ratio**number)) for side in shape[1:])
        coarse = torch.from_numpy(rng.standard_normal((4, high, wide), dtype=np.float32)).double()[None]
        total += torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear") * discount**number
        if high == 1 or wide == 1:
            break
    ours = drawn(shape=shape, **options).noise
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, (total / total.std())[0].numpy(), rtol=1e-4, atol=1e-5)
    assert ours.std(ddof=1) == pytest.approx(1, rel=1e-4)


def test_an_offset_comes_before_the_coarser_noise() -> None:
    """The order of kohya's trainer: what is added last scales all of it to a standard deviation of 1."""
    both = drawn(noise_offset=2.0, multires_noise_iterations=3).noise
    assert both.std(ddof=1) == pytest.approx(1, rel=1e-4)
    assert not np.allclose(both, drawn(multires_noise_iterations=3).noise)


def test_perturbation_is_in_the_input_alone() -> None:
    assert drawn().input_noise is None
    one = drawn(input_perturbation=0.1, noise_offset=0.3)
    assert one.input_noise is not None
    np.testing.assert_array_equal(one.noise, drawn(noise_offset=0.3).noise)
    expected = generator(0, Stream.INPUT_PERTURBATION, 0, 0).standard_normal(one.noise.shape, dtype=np.float32)
    np.testing.assert_allclose(one.input_noise - one.noise, 0.1 * expected, atol=1e-6)
    assert abs(np.corrcoef(expected.ravel(), drawn().noise.ravel())[0, 1]) < 0.15


def positions_of(sampling: str, *, steps: int = 100, slots: int = 10, **section: Any) -> np.ndarray:
    """Timesteps of ``steps`` batches of ``slots``, a row for each batch."""
    return np.array(
        [
            [
                drawn(slot, slots=slots, step=step, shape=(1,), timestep_sampling=sampling, **section).timestep
                for slot in range(slots)
            ]
            for step in range(steps)
        ]
    )


@pytest.mark.parametrize(
    ("sampling", "section"),
    [
        ("uniform", {}),
        ("logit_normal", {}),
        ("logit_normal", {"logit_mean": 1.0, "logit_std": 0.5}),
        ("shifted", {}),
        ("shifted", {"timestep_shift": 0.5}),
        ("uniform", {"min_timestep": 300, "max_timestep": 500}),
        ("logit_normal", {"min_timestep": 300}),
        ("shifted", {"max_timestep": 400}),
    ],
)
def test_timesteps_are_drawn_as_chosen_and_spread_over_the_batch(sampling: str, section: dict[str, Any]) -> None:
    """The distribution function of each, in closed form, makes the draws even again: each tenth once in a batch."""
    low, high = section.get("min_timestep", 0), section.get("max_timestep", 1000)
    timesteps = positions_of(sampling, **section)
    assert low <= timesteps.min() <= timesteps.max() < high
    edges = [(timesteps + edge - low) / (high - low) for edge in (0, 1)]
    shift = section.get("timestep_shift", 3.0)

    def even(share: np.ndarray) -> np.ndarray:
        if sampling == "uniform":
            return share
        if sampling == "shifted":
            return share / (shift - (shift - 1) * share)
        with np.errstate(divide="ignore"):
            logits = torch.from_numpy(np.log(share / (1 - share)))
        mean, std = section.get("logit_mean", 0.0), section.get("logit_std", 1.0)
        return torch.special.ndtr((logits - mean) / std).numpy()

    below, above = (np.sort(even(share), axis=1) for share in edges)
    tenths = np.arange(10) / 10
    assert (below < tenths + 0.1 + 1e-9).all()
    assert (above > tenths - 1e-9).all()
    middles = ((below + above) / 2).ravel()
    assert abs(middles.mean() - 0.5) < 0.01
    assert np.histogram(middles, 20, (0, 1))[0].min() > 20


def test_the_ends_of_every_distribution_are_within_the_range() -> None:
    for sampling in ("uniform", "logit_normal", "shifted"):
        section = ObjectiveSection(
            timestep_sampling=sampling,  # ty: ignore[invalid-argument-type]
            min_timestep=10,
            max_timestep=20,
            logit_std=10,
        )
        assert timestep_at(0.0, section, 1000) == 10
        assert timestep_at(1 - 2.0**-53, section, 1000) == 19


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ("min_timestep=500", "max_timestep=500"),
            "min_timestep = 500: must be less than objective.max_timestep, which is 500",
        ),
        (("max_timestep=1001",), "objective.max_timestep = 1001: must be at most 1000 on this base"),
        (("min_timestep=1000",), "objective.min_timestep = 1000: must be at most 999 on this base"),
    ],
)
def test_a_range_without_levels_is_refused(
    settings: tuple[str, ...], problem: str, tiny_base: Path, tmp_path: Path
) -> None:
    more = [f"objective.{setting}" for setting in settings]
    with pytest.raises(ConfigError, match=problem):
        plan_config(config_for(tiny_base, write_images(tmp_path / "set", 1), tmp_path / "x.safetensors", *more))


def test_a_run_draws_and_judges_by_its_objective(tiny_base: Path, tmp_path: Path) -> None:
    held = write_images(tmp_path / "held", 1)
    sets = [{"images": str(write_images(tmp_path / "set", 2))}, {"images": str(held), "role": "validation"}]
    settings = {"noise_offset": 0.5, "min_timestep": 600, "max_timestep": 604, "timestep_sampling": "shifted"}
    more = [f"objective.{key}={value}" for key, value in settings.items()]
    session = session_for(tiny_base, None, tmp_path / "x.safetensors", f"data.sets={toml(sets)}", *more)
    for step in range(3):
        prepared = session._ahead.take(step)
        expected = [drawn(slot, slots=2, step=step, shape=(4, 8, 8), **settings) for slot in range(2)]
        (inputs,) = prepared.parts(session.base.device, 2)
        assert inputs.timesteps.tolist() == [one.timestep for one in expected]
        np.testing.assert_array_equal(inputs.noise.numpy(), np.stack([one.noise for one in expected]))
    session._ahead.close()
    measured = validation_loss(session, Silence())
    (view,) = session.plan.training.validation
    image, source, total = session.images[view], session.plan.training.items[view.item].source, 0.0
    for timestep in (600, 601, 602, 603):
        rng = generator(0, Stream.VALIDATION_NOISE, timestep, view.item)
        noise = rng.standard_normal(tuple(image.mean.shape), dtype=np.float32)
        total += denoising_loss(
            session.base,
            image.mean[None],
            torch.from_numpy(noise)[None],
            torch.tensor([timestep]),
            session.embeddings.encode([source.rules.plain(source.captions)]),
            time_ids([image.framing]),
            objective=ObjectiveSection(),
        ).item()
    assert measured == pytest.approx(total / 4, rel=1e-5)


def test_a_part_of_a_batch_keeps_its_own_input(tiny_base: Path, tmp_path: Path) -> None:
    more = ("objective.input_perturbation=0.5", "train.micro_batch=1")
    (whole,), (parted,) = (losses(session_in(tmp_path, tiny_base, *given), 1) for given in (more[:1], more))
    assert parted == pytest.approx(whole, rel=1e-4)


def test_the_comparison_with_the_base_stays_within_the_range(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, seen = ("objective.min_timestep=600", "objective.max_timestep=608", "train.steps=50"), []
    sessions = [session_in(tmp_path, tiny_base, *settings, f"objective.loss={loss}") for loss in ("l2", "huber")]
    predict = Base.predict

    def watched(self: Base, noisy: torch.Tensor, timesteps: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(timesteps.item())
        return predict(self, noisy, timesteps, *rest)

    monkeypatch.setattr(Base, "predict", watched)
    squared, huber = (own_losses(session, Silence()) for session in sessions)
    assert squared is not None
    assert huber is not None
    assert seen == [*range(600, 608)] * 2
    assert (squared.losses == huber.losses).all()


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


def test_the_file_states_the_noise_and_the_range() -> None:
    plain = training_metadata(configured(), *facts())
    keys = ("noise_offset", "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma")
    assert {plain[f"ss_{key}"] for key in keys} == {"None"}
    assert "sdlora_objective" not in plain
    metadata = training_metadata(
        configured("objective.noise_offset=0.05", "objective.max_timestep=900", "objective.weighting=soft_min_snr"),
        *facts(),
    )
    assert [metadata[f"ss_{key}"] for key in keys] == ["0.05", "None", "None", "None"]
    coarse = training_metadata(
        configured("objective.multires_noise_iterations=6", "objective.input_perturbation=0.1"), *facts()
    )
    assert [coarse[f"ss_{key}"] for key in keys] == ["None", "6", "0.3", "0.1"]
    assert json.loads(metadata["sdlora_objective"]) == {"max_timestep": 900, "weighting": "soft_min_snr"}
