"""What ``[objective]`` means: each choice a short function beside its paper."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
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


def trained_levels(objective: ObjectiveSection, levels: int) -> range:
    """Those of a schedule's ``levels`` that are trained."""
    return range(objective.min_timestep, levels if objective.max_timestep is None else objective.max_timestep)


def range_problem(objective: ObjectiveSection, levels: int) -> str | None:
    """A sentence where the range of ``objective`` is not within a schedule's ``levels``."""
    key = "min_timestep" if objective.max_timestep is None else "max_timestep"
    if (trained := trained_levels(objective, levels)) and trained.stop <= levels:
        return None
    most = levels - 1 if objective.max_timestep is None else levels
    return f"objective.{key} = {getattr(objective, key)}: must be at most {most} on this base"


def timestep_at(position: float, objective: ObjectiveSection, levels: int) -> int:
    """The timestep at ``position`` in [0, 1): what is drawn evenly there is drawn as ``timestep_sampling`` says.

    Positions that are spread over a batch stay so, since this rises with them.
    """
    trained = trained_levels(objective, levels)
    if objective.timestep_sampling == "logit_normal":
        position = logit_normal(position, mean=objective.logit_mean, std=objective.logit_std)
    elif objective.timestep_sampling == "shifted":
        position = shifted(position, objective.timestep_shift)
    return trained[min(len(trained) - 1, int(position * len(trained)))]


def logit_normal(position: float, *, mean: float, std: float) -> float:
    """The inverse of the distribution function of sigmoid(m + s z), z normal (Esser et al. 2024, section 3.1)."""
    inside = min(max(position, SMALLEST_SHARE), 1 - SMALLEST_SHARE)
    return 1 / (1 + math.exp(-mean - std * NormalDist().inv_cdf(inside)))


SMALLEST_SHARE = 2.0**-53
"""The normal distribution has no value at 0; random numbers are multiples of this."""


def shifted(position: float, shift: float) -> float:
    """s t / (1 + (s - 1) t) (Esser et al. 2024, section 5.3.2)."""
    return shift * position / (1 + (shift - 1) * position)


def offset_noise(noise: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """``noise`` (4, h, w) and a normal number times ``strength`` for each channel (Guttenberg 2023, "Offset noise")."""
    offsets = rng.standard_normal((len(noise), 1, 1), dtype=np.float32)
    return noise + np.float32(strength) * offsets


def multires_noise(noise: np.ndarray, rng: np.random.Generator, *, iterations: int, discount: float) -> np.ndarray:
    """``noise`` (4, h, w) with enlarged noise of coarser and coarser grids, at a standard deviation of 1 (Whitaker 2023).

    As in kohya's trainer the i-th grid, from 0, is r^i times smaller with r drawn from [2, 4), and counts d^i; the last has
    a single row or column. There a batch shares each r and the standard deviation; here every image has its own.
    """
    height, width = noise.shape[-2:]
    total = noise.astype(np.float32)
    for number in range(iterations):
        smaller = (2 * rng.random() + 2) ** number
        rows, columns = max(1, int(height / smaller)), max(1, int(width / smaller))
        coarse = rng.standard_normal((len(noise), rows, columns), dtype=np.float32)
        enlarged = _enlarging(rows, height) @ coarse @ _enlarging(columns, width).T
        total = total + np.float32(discount**number) * enlarged
        if 1 in (rows, columns):
            break
    return total / total.std(ddof=1)


def _enlarging(size: int, larger: int) -> np.ndarray:
    """The matrix (larger, size) of linear interpolation between the middles of pixels."""
    places = np.maximum((np.arange(larger) + 0.5) * size / larger - 0.5, 0)
    first = places.astype(np.int64)
    share = (places - first).astype(np.float32)
    matrix = np.zeros((larger, size), np.float32)
    np.add.at(matrix, (np.arange(larger), first), 1 - share)
    np.add.at(matrix, (np.arange(larger), np.minimum(first + 1, size - 1)), share)
    return matrix


def perturbed(noise: np.ndarray, rng: np.random.Generator, gamma: float) -> np.ndarray:
    """ε + γ ξ: the noise in the input, while ε stays the target (Ning et al. 2023)."""
    return noise + np.float32(gamma) * rng.standard_normal(noise.shape, dtype=np.float32)
