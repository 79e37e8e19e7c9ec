"""A limit on the norm of each module's change, kohya's ``scale_weight_norms``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .change import Change
from .kinds import Decomposed, Hadamard, Kronecker
from .low_rank import LowRank


@torch.no_grad()
def limit_norm(change: Change, most: float) -> None:
    """Multiply the tensors of ``change`` in place so that ‖ΔW‖ is at most ``most``; nothing is read back from the device.

    All factors are multiplied by the same number, as in kohya's trainer and in LyCORIS' LoKr. For DoRA ΔW is the change of
    the direction. ``change`` is of a kind that is trained, without a Tucker core; other kinds stay as they are.
    """
    if isinstance(change, Decomposed):
        limit_norm(change.inner, most)
    elif isinstance(change, LowRank):
        up, down = change.up.flatten(1), change.down.flatten(1)
        square = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
        _shrink((change.up, change.down), square.sqrt() * abs(change.scale), most)
    elif isinstance(change, Hadamard):
        factors = (change.w1_a, change.w1_b, change.w2_a, change.w2_b)
        matrix = (change.w1_a @ change.w1_b) * (change.w2_a @ change.w2_b)
        _shrink(factors, torch.linalg.vector_norm(matrix) * (change.alpha / change.rank), most)
    elif isinstance(change, Kronecker) and change.w1 is not None:
        second = [factor for factor in (change.w2, change.w2_a, change.w2_b) if factor is not None]
        scale = 1.0 if change.rank is None else change.alpha / change.rank
        matrix = second[0] if len(second) == 1 else second[0] @ second[1]
        norm = torch.linalg.vector_norm(change.w1) * torch.linalg.vector_norm(matrix) * scale
        _shrink((change.w1, *second), norm, most)


def _shrink(factors: Sequence[Tensor], norm: Tensor, most: float) -> None:
    """Multiply each of ``factors`` by the same number, so that ``norm`` of their product becomes at most ``most``."""
    ratio = (most / norm.clamp(min=most / 2)).clamp(max=1.0) ** (1 / len(factors))
    for factor in factors:
        factor.mul_(ratio)
