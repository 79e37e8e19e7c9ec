"""LoHa as it is trained: the product, value by value, of two low-rank matrices (Hyeon-Woo et al. 2022, eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .adapted_layer import FrozenLayer, shape_of
from .computed_layer import ComputedLayer
from .dropout import ModuleDropout
from .kinds import Hadamard
from .start_values import normal
from .trainable import NOTHING_FIXED, like_of


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainableHadamard:
    """``alpha`` / ``rank`` · (A₁ B₁) ⊙ (A₂ B₂) beside ``module``: A₂ starts as zero, the others random, as in LyCORIS."""

    module: FrozenLayer
    rank: int
    alpha: float
    dropout: ModuleDropout | None = None

    @property
    def fixed(self) -> Mapping[str, Tensor]:
        """See ``Trainable``."""
        return NOTHING_FIXED

    @property
    def like(self) -> Tensor:
        """See ``Trainable``."""
        return like_of(self.module)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """``w1_a`` and ``w2_a`` (out, rank), ``w1_b`` and ``w2_b`` (rank, in · kh · kw)."""
        out, *inner = shape_of(self.module)
        a, b = (out, self.rank), (self.rank, math.prod(inner))
        return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}

    def start(self, name: str, seed: int) -> dict[str, Tensor]:
        """See ``Trainable``."""
        deviations = {"w1_a": 0.1, "w1_b": 1.0, "w2_b": 1.0}
        return {key: normal(self.shapes[key], seed, f"{name}.{key}") * size for key, size in deviations.items()}

    def layer(self, leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> ComputedLayer:
        """See ``Trainable``."""
        scale = self.alpha / self.rank

        def formula(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
            return (w1_a @ w1_b) * (w2_a @ w2_b) * scale

        return ComputedLayer(self.module, leaves, gradients, formula=formula, dropout=self.dropout)

    def change(self, tensors: Mapping[str, Tensor]) -> Hadamard:
        """See ``Trainable``."""
        return Hadamard(**tensors, alpha=self.alpha)
