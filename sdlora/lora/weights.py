"""The change of one module as a product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """``down`` is (rank, in) or (rank, in, kh, kw); ``up`` is (out, rank) or (out, rank, 1, 1)."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this changes: (out, in) or (out, in, kh, kw)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> torch.Tensor:
        """The change of the weight, alpha / rank · up @ down, in float32 (Hu et al. 2021, section 4.1)."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        return (up @ down).mul_(self.scale).view(self.weight_shape)

    def norm(self) -> float:
        """Frobenius norm of ``delta()``, from rank × rank matrices: ‖UD‖² = tr(UᵀU · DDᵀ)."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        return abs(self.scale) * max(0.0, float(((up.T @ up) * (down @ down.T)).sum())) ** 0.5
