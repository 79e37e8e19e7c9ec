"""The change of one module as a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .change import Change


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Change):
    """``down`` is (rank, in) or (rank, in, kh, kw); ``up`` is (out, rank) or (out, rank, 1, 1).

    With a Tucker core ``mid`` (rank, rank, kh, kw), ``down`` is (rank, in, 1, 1).
    """

    kind = "lora"
    reads_weight = False
    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank, the factor of the product."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this changes: (out, in) or (out, in, kh, kw)."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def delta(self, weight: Tensor) -> Tensor:
        """alpha / rank · up @ down (Hu et al. 2021, section 4.1), in the shape and dtype of ``weight``."""
        down, up = self.matrices(weight)
        return (up @ down).mul_(self.scale).reshape(weight.shape)

    def matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """``down`` (rank, in · kh · kw), a core multiplied into it, and ``up`` (out, rank), where and as ``like`` is."""
        up, down = self.up.to(like).flatten(1), self.down.to(like).flatten(1)
        if self.mid is not None:
            down = torch.einsum("mn...,ni->mi...", self.mid.to(like), down).flatten(1)
        return down, up

    def evened(self) -> LowRank:
        """The same change, with the largest numbers of ``up`` and ``down`` about equal in each of the ranks.

        Factors are powers of two, so nothing is rounded. For float16, which loses bits below 6e-5: a scale such as
        1 / 128 in one of the matrices alone would bring it there.
        """
        into, out = self.down.flatten(1).abs().amax(1), self.up.flatten(1).abs().amax(0)
        halves = ((into.double().log2() - out.double().log2()) / 2).round()
        factors = halves.where(halves.isfinite(), 0.0).exp2()
        rows = factors.reshape(-1, *(1 for _ in self.down.shape[1:])).to(self.down)
        return replace(self, down=self.down / rows, up=self.up * rows.to(self.up).reshape(-1, *self.up.shape[2:]))

    def tensors(self) -> dict[str, Tensor]:
        """By their names in kohya's and LyCORIS' files, alpha not among them."""
        named = {"lora_down.weight": self.down, "lora_up.weight": self.up}
        return named if self.mid is None else named | {"lora_mid.weight": self.mid}

    def norm(self) -> float:
        """Frobenius norm of the change, from rank × rank matrices: ‖UD‖² = tr(UᵀU · DDᵀ)."""
        if self.mid is not None:
            return float(self.delta(torch.zeros(self.weight_shape)).norm())
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        return abs(self.scale) * max(0.0, float(((up.T @ up) * (down @ down.T)).sum())) ** 0.5


def joined(changes: Sequence[tuple[LowRank, float]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w · alpha / rank · up @ down as one product: down (Σ rank, in · kh · kw) and up (out, Σ rank), as ``like`` is."""
    pairs = [(change.matrices(like), change.scale * strength) for change, strength in changes]
    return torch.cat([down for (down, _), _ in pairs]), torch.cat([up * factor for (_, up), factor in pairs], dim=1)
