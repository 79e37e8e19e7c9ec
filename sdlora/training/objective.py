"""What ``[objective]`` means: each choice a short function beside its paper."""

from __future__ import annotations

from torch import Tensor

from ..base.schedule import NoiseSchedule
from ..config.sections import ObjectiveSection


def level_weights(timesteps: Tensor, schedule: NoiseSchedule, objective: ObjectiveSection) -> Tensor:
    """Factor on the loss of an image at each of ``timesteps`` (b,): (b,) float32, by ``objective.weighting``."""
    gamma = objective.min_snr_gamma
    if objective.weighting == "debiased":
        return schedule.debiased_weight(timesteps)
    if objective.weighting == "soft_min_snr" and gamma:
        return schedule.soft_min_snr_weight(timesteps, gamma)
    return schedule.min_snr_weight(timesteps, gamma if objective.weighting == "min_snr" else 0)


def penalties(errors: Tensor, timesteps: Tensor, schedule: NoiseSchedule, objective: ObjectiveSection) -> Tensor:
    """What each of ``errors`` (b, 4, h, w) costs, by ``objective.loss``.

    ``huber`` is 2c (√(e² + c²) - c), near e² for errors below c and 2c |e| above; ``smooth_l1`` is that without the factor
    c, near e² / c and 2 |e| (pseudo-Huber losses as in kohya's trainer, by Khrapov et al. 2024).
    """
    if objective.loss == "l2":
        return errors.square()
    threshold = huber_thresholds(timesteps, schedule, objective)[:, None, None, None]
    squares = errors.square()
    excess = 2 * squares / ((squares + threshold.square()).sqrt() + threshold)  # Without a difference of near numbers.
    return excess * threshold if objective.loss == "huber" else excess


def huber_thresholds(timesteps: Tensor, schedule: NoiseSchedule, objective: ObjectiveSection) -> Tensor:
    """The threshold c at each of ``timesteps`` (b,): (b,) float32 (Khrapov et al. 2024).

    ``exponential`` is c^(t / T). ``snr`` is (1 - c) / (1 + σ)² + c with σ = √((1 - ᾱ) / ᾱ), as in kohya's trainer.
    """
    least, signal = objective.huber_c, schedule.alphas_cumprod[timesteps]
    if objective.huber_schedule == "exponential":
        return least ** (timesteps / len(schedule.alphas_cumprod))
    if objective.huber_schedule == "constant":
        return signal.new_full(signal.shape, least)
    root = signal.sqrt()
    return (1 - least) * (root / (root + (1 - signal).sqrt())).square() + least
