"""Ways to merge whole changes that interfere with each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def mean(deltas: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The weighted mean Σ w · ΔW / Σ w. The weights must not sum to 0."""
    return _sum(deltas) / sum(weight for _, weight in deltas)


def ties(deltas: Sequence[tuple[Tensor, float]], *, density: float) -> Tensor:
    """TIES (Yadav et al. 2023, algorithm 1), each module by itself.

    Of each w · ΔW the ``density`` largest numbers stay; where signs disagree, the sign with the larger sum wins, and the
    numbers with that sign are averaged.
    """
    trimmed = torch.stack([_trimmed(weight * delta, density) for delta, weight in deltas])
    sign = trimmed.sum(0).sign()
    agreeing = torch.where(trimmed.sign() == sign, trimmed, 0.0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def dare(deltas: Sequence[tuple[Tensor, float]], *, density: float, rng: np.random.Generator) -> Tensor:
    """DARE (Yu et al. 2024, section 3.2): Σ w · ΔW, where of each ΔW a random share ``density`` stays, divided by it."""
    kept = []
    for delta, weight in deltas:
        mask = torch.from_numpy(rng.random(tuple(delta.shape)) < density)
        kept.append((torch.where(mask, delta / density, 0.0), weight))
    return _sum(kept)


def _sum(deltas: Sequence[tuple[Tensor, float]]) -> Tensor:
    return torch.stack([weight * delta for delta, weight in deltas]).sum(0)


def _trimmed(delta: Tensor, density: float) -> Tensor:
    count = max(1, int(density * delta.numel()))
    # The smallest number that stays; equal ones stay too, so that the order of the numbers has no part.
    least = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(delta.abs() >= least, delta, 0.0)
