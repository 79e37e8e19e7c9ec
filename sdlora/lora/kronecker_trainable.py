"""LoKr as it is trained: a Kronecker product, whose larger factor is of low rank (Yeh et al. 2023, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .adapted_layer import FrozenLayer, shape_of
from .computed_layer import ComputedLayer
from .dropout import ModuleDropout
from .kinds import Kronecker
from .start_values import kaiming_uniform
from .trainable import NOTHING_FIXED, like_of


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainableKronecker:
    """``alpha`` / ``rank`` · W₁ ⊗ (A₂ B₂) beside ``module``: B₂ starts as zero, the others random, as in LyCORIS.

    Where ``rank`` is at least half of the longer side of the second factor, that is a whole matrix W₂, which starts as
    zero, and the scale is 1.
    """

    module: FrozenLayer
    rank: int
    alpha: float
    factor: int
    """See ``divided``."""
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
        """``w1`` (a, c), and ``w2`` (b, d, kh, kw) or ``w2_a`` (b, rank) and ``w2_b`` (rank, d · kh · kw), for a weight of
        a · b outputs and c · d inputs."""
        out, inner, *kernel = shape_of(self.module)
        (a, b), (c, d) = divided(out, self.factor), divided(inner, self.factor)
        if self.rank >= max(b, d) / 2:
            return {"w1": (a, c), "w2": (b, d, *kernel)}
        return {"w1": (a, c), "w2_a": (b, self.rank), "w2_b": (self.rank, d * math.prod(kernel))}

    @property
    def _is_whole(self) -> bool:
        return "w2" in self.shapes

    def start(self, name: str, seed: int) -> dict[str, Tensor]:
        """See ``Trainable``."""
        random = (key for key in self.shapes if key in ("w1", "w2_a"))
        return {key: kaiming_uniform(self.shapes[key], seed, f"{name}.{key}") for key in random}

    def layer(self, leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> ComputedLayer:
        """See ``Trainable``."""
        scale = 1.0 if self._is_whole else self.alpha / self.rank

        def formula(w1: Tensor, *second: Tensor) -> Tensor:
            w2 = second[0].flatten(1) if len(second) == 1 else second[0] @ second[1]
            return (w1 * scale)[:, None, :, None] * w2[None, :, None, :]

        return ComputedLayer(self.module, leaves, gradients, formula=formula, dropout=self.dropout)

    def change(self, tensors: Mapping[str, Tensor]) -> Kronecker:
        """See ``Trainable``. The alpha of whole matrices is the rank, for a scale of 1, as LyCORIS writes it."""
        return Kronecker(**tensors, alpha=float(self.rank) if self._is_whole else self.alpha)


def divided(size: int, factor: int) -> tuple[int, int]:
    """(m, n) with m n = ``size`` and m at most n: m is ``factor`` where that divides ``size``, else the largest divisor
    that is at most ``factor``; with -1 the two are as near to each other as possible."""
    if factor > 0 and size % factor == 0:
        m, n = sorted((factor, size // factor))
        return m, n
    limit = size if factor < 0 else factor
    m = max(each for each in range(1, math.isqrt(size) + 1) if size % each == 0 and each <= limit)
    return m, size // m
