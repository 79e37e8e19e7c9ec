"""The plain low-rank change of a layer as it is trained (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .adapted_layer import FrozenLayer, shape_of
from .dropout import ModuleDropout
from .layers import LoraLinear
from .low_rank import LowRank
from .low_rank_layer import LowRankLayer
from .start_values import kaiming_uniform, normal
from .trainable import NOTHING_FIXED, like_of


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainableLowRank:
    """``alpha`` / ``rank`` · up @ down beside ``module``: down starts random, up zero."""

    module: FrozenLayer
    rank: int
    alpha: float
    dropout: ModuleDropout | None = None
    gaussian: bool = False
    """Whether ``down`` starts from N(0, 1 / rank²), as peft's ``gaussian``."""

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
        """``down`` (rank, in[, kh, kw]) and ``up`` (out, rank[, 1, 1])."""
        out, *inner = shape_of(self.module)
        return {"down": (self.rank, *inner), "up": (out, self.rank, *(1 for _ in inner[1:]))}

    def start(self, name: str, seed: int) -> dict[str, Tensor]:
        """See ``Trainable``."""
        shape = self.shapes["down"]
        return {"down": normal(shape, seed, name) / self.rank if self.gaussian else kaiming_uniform(shape, seed, name)}

    def layer(self, leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> nn.Module:
        """See ``Trainable``."""
        scale = self.alpha / self.rank
        if isinstance(self.module, nn.Conv2d) or self.dropout is not None:
            return LowRankLayer(self.module, leaves, gradients, scale=scale, dropout=self.dropout)
        buffers = (gradients["down"], gradients["up"])
        return LoraLinear(self.module, leaves["down"], leaves["up"], scale, gradients=buffers)

    def change(self, tensors: Mapping[str, Tensor]) -> LowRank:
        """See ``Trainable``."""
        return LowRank(down=tensors["down"], up=tensors["up"], alpha=self.alpha)
