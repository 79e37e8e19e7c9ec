"""Changes made of others: joined exactly, summed, and cut to a lower rank by their singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .change import Change
from .low_rank import LowRank

EXACT = 1e-7
"""Singular values below this share of the largest are rounding errors of float32."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which singular values of a change are kept: the largest, as many as every given limit allows, and at least one."""

    rank: int | None = None
    """Number, at most."""
    energy: float | None = None
    """As few as hold this share of the sum of their squares, above 0 and up to 1."""
    ratio: float | None = None
    """Those of at least the largest divided by this."""

    def kept(self, values: Tensor) -> int:
        """How many of ``values``, the singular values in falling order, are kept."""
        count = int((values > EXACT * values[:1]).sum())
        if self.rank is not None:
            count = min(count, self.rank)
        if self.energy is not None:
            shares = values.square().cumsum(0) / values.square().sum()
            count = min(count, 1 + int((shares < self.energy - 1e-12).sum()))
        if self.ratio is not None:
            count = min(count, int((values * self.ratio >= values[:1]).sum()))
        return max(1, count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """A change as Σ values[i] · left[:, i] ⊗ right[i], float64, the values in falling order.

    ``left`` (out, k) and ``right`` (k, in · kh · kw) are orthonormal where the values are above rounding errors.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    shape: tuple[int, ...]
    """Shape of the weight that is changed."""

    @classmethod
    def of_product(cls, pairs: Sequence[tuple[LowRank, float]], shape: tuple[int, ...]) -> Spectrum:
        """That of Σ strength · ΔW, without forming ΔW: by QR of the joined matrices."""
        up, down = _joined(pairs)
        left, upper = torch.linalg.qr(up)
        right, lower = torch.linalg.qr(down.T)
        inner_left, values, inner_right = torch.linalg.svd(upper @ lower.T)
        count = len(values)
        return cls(left=left @ inner_left[:, :count], values=values, right=inner_right[:count] @ right.T, shape=shape)

    @classmethod
    def of_matrix(cls, delta: Tensor) -> Spectrum:
        """That of a whole ΔW of any shape, from the eigenvectors of its smaller Gram matrix in float64.

        Several times as fast as a decomposition of ΔW itself. Values below 1e-8 of the largest are lost, which is less than
        float32 holds.
        """
        matrix = delta.double().flatten(1)
        wide = matrix.shape[0] <= matrix.shape[1]
        upright = matrix if wide else matrix.T
        squares, vectors = torch.linalg.eigh(upright @ upright.T)
        vectors = vectors.flip(1)
        values = squares.flip(0).clamp(min=0).sqrt()
        projected = (vectors.T @ upright) / values.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        left, right = (vectors, projected) if wide else (projected.T, vectors.T)
        return cls(left=left, values=values, right=right, shape=tuple(delta.shape))

    def cut(self, cut: Cut) -> LowRank:
        """The closest change of lower rank (Eckart & Young 1936), float32, at alpha = rank."""
        count = cut.kept(self.values)
        roots = self.values[:count].sqrt()
        up, down = self.left[:, :count] * roots, self.right[:count] * roots[:, None]
        return _low_rank(up, down, self.shape)

    def energy(self, count: int) -> float:
        """Share of ‖ΔW‖² that the ``count`` largest values hold; 1 for a change of zero."""
        total = self.values.square().sum()
        return float(self.values[:count].square().sum() / total) if total > 0 else 1.0


def plain(change: Change) -> LowRank | None:
    """``change`` as a product of two matrices without a core; None if it is of another kind."""
    if not isinstance(change, LowRank):
        return None
    if change.mid is None:
        return change
    down = torch.einsum("mn...,ni->mi...", change.mid.double(), change.down.double().flatten(1))
    return LowRank(down=down.float(), up=change.up, alpha=change.scale * down.shape[0])


def joined(pairs: Sequence[tuple[LowRank, float]], shape: tuple[int, ...]) -> LowRank:
    """Σ strength · ΔW exactly: the matrices one beside the other, with the scales in ``up``; ranks add up."""
    return _low_rank(*_joined(pairs), shape)


def summed(changes: Sequence[tuple[Change, float]], weight: Tensor) -> Tensor:
    """Σ strength · ΔW in the shape of ``weight``, float64; the pristine ``weight`` counts for kinds that depend on it."""
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for change, strength in changes:
        total += strength * change.delta(weight.double())
    return total


def inner_product(first: LowRank, second: LowRank) -> float:
    """⟨ΔW₁, ΔW₂⟩ by matrices of rank × rank: tr(U₁ᵀU₂ · D₂D₁ᵀ)."""
    (up, down), (other_up, other_down) = _joined([(first, 1.0)]), _joined([(second, 1.0)])
    return float(((up.T @ other_up) * (down @ other_down.T)).sum())


def overlap(first: Spectrum, second: Spectrum, *, of: str) -> float:
    """How much of the smaller subspace lies in the larger one, from 0 to 1: ‖AᵀB‖²/min(rank) over orthonormal bases.

    ``of`` is ``outputs``, the columns of the changes, or ``inputs``, their rows (Golub & Van Loan 2013, section 6.4.3).
    """
    bases = []
    for spectrum in (first, second):
        count = Cut().kept(spectrum.values)
        bases.append(spectrum.left[:, :count] if of == "outputs" else spectrum.right[:count].T)
    return float((bases[0].T @ bases[1]).square().sum() / min(base.shape[1] for base in bases))


def _joined(pairs: Sequence[tuple[LowRank, float]]) -> tuple[Tensor, Tensor]:
    """``up`` (out, Σ rank) with every scale and strength, and ``down`` (Σ rank, in · kh · kw); float64."""
    up = torch.cat([change.up.double().flatten(1) * (change.scale * strength) for change, strength in pairs], dim=1)
    return up, torch.cat([change.down.double().flatten(1) for change, _ in pairs])


def _low_rank(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> LowRank:
    """Matrices with the scale in them -> a change of a weight of ``shape``, float32, at alpha = rank."""
    rank = down.shape[0]
    kernel = shape[2:]
    assert math.prod(shape[1:]) == down.shape[1]
    return LowRank(
        down=down.reshape(rank, shape[1], *kernel).float(),
        up=up.reshape(shape[0], rank, *(1 for _ in kernel)).float(),
        alpha=float(rank),
    )
