"""The noise schedule against diffusers' own, and the weights against their formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from sdlora.base.schedule import NoiseSchedule, Prediction, ScheduleFacts
from sdlora.config.sections import OptimizerSection
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.rates import rate_factor


@pytest.fixture(params=["epsilon", "v_prediction", "sample"])
def pair(request: pytest.FixtureRequest) -> tuple[NoiseSchedule, DDPMScheduler]:
    prediction: Prediction = request.param
    reference = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    return NoiseSchedule.of(ScheduleFacts(prediction=prediction)), reference


def test_noise_and_targets_equal_diffusers(pair: tuple[NoiseSchedule, DDPMScheduler]) -> None:
    ours, reference = pair
    latents, noise = torch.randn(2, 6, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(
        ours.add_noise(latents, noise, timesteps), reference.add_noise(latents, noise, timesteps)
    )
    velocity = reference.get_velocity(latents, noise, timesteps)
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[ours.prediction]
    torch.testing.assert_close(ours.target(latents, noise, timesteps), expected)


def test_min_snr_weights_follow_their_formula(pair: tuple[NoiseSchedule, DDPMScheduler]) -> None:
    ours, reference = pair
    timesteps = torch.arange(0, 1000, 37)
    alphas = reference.alphas_cumprod.double()[timesteps]
    snr = alphas / (1 - alphas)
    expected = (
        torch.minimum(snr, torch.tensor(5.0))
        / {
            "epsilon": snr,
            "v_prediction": snr + 1,
            "sample": torch.ones_like(snr),
        }[ours.prediction]
    )
    torch.testing.assert_close(ours.min_snr_weight(timesteps, 5.0).double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours.min_snr_weight(timesteps, 0), torch.ones(len(timesteps)))


def test_learning_rates_warm_up_and_descend() -> None:
    section = OptimizerSection(warmup_steps=10, schedule="cosine")
    factors = [rate_factor(step, section, steps=100) for step in range(100)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert rate_factor(99, OptimizerSection(schedule="constant"), steps=100) == 1.0
    assert rate_factor(60, OptimizerSection(warmup_steps=20, schedule="linear"), steps=100) == 0.5


def test_optimizer_equals_the_reference_and_leaves_out_broken_steps() -> None:
    section = OptimizerSection(warmup_steps=0, schedule="constant", max_grad_norm=0.5)
    torch.manual_seed(0)
    start = torch.randn(50)
    ours, reference = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    guarded = GuardedAdamW([ours], [1e-2], section, steps=20)
    adam = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(20):
        gradient = torch.randn(50)
        ours.grad = gradient.clone()
        if step in (3, 4, 11):
            ours.grad[7] = torch.nan if step == 3 else torch.inf
        else:
            reference.grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_([reference], 0.5)
            adam.step()
        guarded.step(step)
    assert guarded.skipped_steps() == 3
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
