"""Low-rank changes that start elsewhere than at a random ``down`` and an ``up`` of zero: PiSSA, and orthogonal factors.

A change is trained relative to its start: with the factors D₀ and U₀ it is alpha / rank · (U D - U₀ D₀), where U and D
start as U₀ and D₀. So the base's weights stay as they are, in every dtype and quantised too, and the file holds a plain
LoRA for the original base, of twice the rank. The trained tensors are the differences D - D₀ and U - U₀: they start at
zero, and keep their precision where the base computes in half precision. AdamW moves them as it would move D and U,
except that its weight decay pulls towards the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .dropout import ModuleDropout
from .low_rank import LowRank
from .low_rank_trainable import TrainableLowRank
from .quantized import FrozenLinear, dense_weight
from .relative_layer import RelativeLinear, joined

Init = Literal["pissa", "orthogonal"]
ITERATIONS = 8
"""Rounds of the subspace iteration. The factors need not be exact singular vectors: they decide where training starts, and
the change is relative to them, whatever they are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainableRelative:
    """``alpha`` / ``rank`` · (U D - U₀ D₀) beside ``module``, zero at the start."""

    module: FrozenLinear
    rank: int
    alpha: float
    init: Init
    name: str
    """Canonical name of the module; with ``seed`` it decides the random numbers."""
    seed: int
    dropout: ModuleDropout | None = None

    @property
    def like(self) -> Tensor:
        """See ``Trainable``."""
        return self._plain.like

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """``down`` (rank, in) and ``up`` (out, rank): the differences from the start."""
        return self._plain.shapes

    def start(self, name: str, seed: int) -> dict[str, Tensor]:
        """See ``Trainable``; all differences are zero."""
        return {}

    def layer(self, leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> RelativeLinear:
        """See ``Trainable``."""
        return RelativeLinear(
            self.module,
            leaves["down"],
            leaves["up"],
            self._factors,
            self.alpha / self.rank,
            gradients=(gradients["down"], gradients["up"]),
            dropout=self.dropout,
        )

    @property
    def fixed(self) -> dict[str, Tensor]:
        """``down0`` (rank, in) and ``up0`` (out, rank), what ``layer`` computes with; writing to them changes the start."""
        down, up = self._factors
        return {"down0": down, "up0": up}

    def change(self, tensors: Mapping[str, Tensor]) -> LowRank:
        """See ``Trainable``; twice the rank at twice the alpha."""
        down, up = tensors["down"], tensors["up"]
        down0, up0 = (factor.to(down) for factor in self._factors)
        down, up = joined(down, up, down0, up0)
        return LowRank(down=down, up=up, alpha=2 * self.alpha)

    @cached_property
    def _plain(self) -> TrainableLowRank:
        return TrainableLowRank(module=self.module, rank=self.rank, alpha=self.alpha)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """(D₀, U₀) as the layer computes with them."""
        down, up = self.shapes["down"], self.shapes["up"]
        if self.like.is_meta:
            return self.like.new_empty(down), self.like.new_empty(up)
        if self.init == "orthogonal":
            factors = tuple(orthonormal(shape, self.seed, f"{self.name}.{key}") for key, shape in self.shapes.items())
        else:
            factors = principal_factors(dense_weight(self.module), self.rank, scale=self.alpha / self.rank)
        return factors[0].to(self.like).contiguous(), factors[1].to(self.like).contiguous()


def orthonormal(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """(m, n) float32, uniform among the matrices with orthonormal rows, or columns where there are fewer of these.

    By the QR decomposition of normal numbers with the signs of Mezzadri 2007, section 5; a function of (seed, name).
    """
    values = _normal(shape, seed, name)
    q, r = np.linalg.qr(values.T if shape[0] < shape[1] else values)
    q = q * np.sign(np.diag(r))
    return torch.from_numpy((q.T if shape[0] < shape[1] else q).astype(np.float32))


def principal_factors(weight: Tensor, rank: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """D₀ (rank, in) and U₀ (out, rank), float32, such that ``scale`` · U₀ D₀ is the best change of that rank to zero.

    S^½ Vᵀ and U S^½ of the ``rank`` largest singular values over √``scale`` (Meng et al. 2024, eq. 2 and 3), zero beyond
    the rank of ``weight``, (out, in). By subspace iteration (Halko et al. 2011, algorithms 4.4 and 5.1), on the device of
    ``weight``, except for Metal, which has no QR decomposition in torch 2.11, and later a slow one: on the CPU.
    """
    weight = weight.detach().to(torch.device("cpu") if weight.device.type == "mps" else weight.device).float()
    width = min(2 * rank + 8, *weight.shape)
    basis = torch.from_numpy(_normal((weight.shape[1], width), 0, "subspace").astype(np.float32)).to(weight.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis).Q).Q
    left = torch.linalg.qr(weight @ basis).Q
    u, s, vh = torch.linalg.svd(left.T @ weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    down, up = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    down[: len(root)] = root[:, None] * vh[:rank]
    up[:, : len(root)] = left @ u[:, :rank] * root
    return down, up


def _normal(shape: tuple[int, ...], seed: int, name: str) -> np.ndarray:
    """Standard normal numbers, float64: by (seed, name) alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}/start".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)
