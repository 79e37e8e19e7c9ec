"""A low-rank change that starts from one that a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapted_layer import weight_of
from .change import Change
from .low_rank import LowRank
from .low_rank_trainable import TrainableLowRank
from .relative_trainable import principal_factors


@dataclass(frozen=True, kw_only=True, eq=False)
class StartedTrainable:
    """``fresh``, whose change at the start is ``change``, or the nearest of its rank."""

    fresh: TrainableLowRank
    change_of_file: Change

    @property
    def module(self) -> nn.Module:
        """See ``Trainable``."""
        return self.fresh.module

    @property
    def like(self) -> Tensor:
        """See ``Trainable``."""
        return self.fresh.like

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """``down`` and ``up``, as ``fresh`` has them."""
        return self.fresh.shapes

    @property
    def fixed(self) -> Mapping[str, Tensor]:
        """See ``Trainable``."""
        return self.fresh.fixed

    def start(self, name: str, seed: int) -> dict[str, Tensor]:
        """See ``Trainable``.

        Where the file has the same rank and scale, its very values. Another alpha / rank is a factor on ``up``; ranks that
        the file lacks start as they do without it, and those that it has too many of are truncated by SVD.
        """
        scale, shapes = self.fresh.alpha / self.fresh.rank, self.shapes
        down, up = _factors(self.change_of_file, self.fresh, scale)
        start = {key: torch.zeros(shape) for key, shape in shapes.items()}
        start |= {key: values.clone() for key, values in self.fresh.start(name, seed).items()}
        start["down"].flatten(1)[: len(down)] = down
        start["up"].flatten(1)[:, : len(down)] = up
        return start

    def layer(self, leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> nn.Module:
        """See ``Trainable``."""
        return self.fresh.layer(leaves, gradients)

    def change(self, tensors: Mapping[str, Tensor]) -> Change:
        """See ``Trainable``."""
        return self.fresh.change(tensors)


def _factors(change: Change, fresh: TrainableLowRank, scale: float) -> tuple[Tensor, Tensor]:
    """D (r, in) and U (out, r), float32 on the CPU, r at most ``fresh.rank``: ``scale`` · U D is ``change`` or near it."""
    if isinstance(change, LowRank) and change.mid is None:
        down, up = change.down.float().flatten(1), change.up.float().flatten(1)
        if change.rank <= fresh.rank:
            ratio = change.scale / scale
            return down, up if ratio == 1 else up * ratio
        return truncated(down, up, fresh.rank, factor=change.scale / scale)
    weight = weight_of(fresh.module).detach().float().cpu()
    down, up = principal_factors(change.delta(weight).flatten(1), fresh.rank, scale=scale)
    return down, up


def truncated(down: Tensor, up: Tensor, rank: int, *, factor: float) -> tuple[Tensor, Tensor]:
    """D (rank, in) and U (out, rank), float32, whose product is the best of that rank to ``factor`` · ``up`` @ ``down``.

    By the singular values of the product, from the QR decompositions of both factors (Eckart & Young 1936), in float64.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T * factor, full_matrices=False)
    root = s[:rank].sqrt()
    shorter_down, shorter_up = root[:, None] * (vh[:rank] @ q_down.T), q_up @ u[:, :rank] * root
    return shorter_down.float(), shorter_up.float()
