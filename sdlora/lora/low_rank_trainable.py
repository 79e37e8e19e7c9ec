"""The plain low-rank change of a linear layer as it is trained (Hu et al. 2021)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layers import LoraLinear
from .low_rank import LowRank
from .quantized import FrozenLinear, QuantizedLinear
from .trainable import empty_like


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainableLowRank:
    """``alpha`` / ``rank`` · up @ down beside ``module``: down starts random, up zero."""

    module: FrozenLinear
    rank: int
    alpha: float

    @property
    def like(self) -> Tensor:
        """See ``Trainable``."""
        module = self.module
        if isinstance(module, QuantizedLinear):
            return empty_like(module.device, module.dtype)
        return empty_like(module.weight.device, module.weight.dtype)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """``down`` (rank, in) and ``up`` (out, rank)."""
        return {"down": (self.rank, self.module.in_features), "up": (self.module.out_features, self.rank)}

    def start(self, name: str, seed: int) -> dict[str, Tensor]:
        """See ``Trainable``."""
        return {"down": kaiming_uniform(self.shapes["down"], seed, name)}

    def layer(self, leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> LoraLinear:
        """See ``Trainable``."""
        return LoraLinear(
            self.module,
            leaves["down"],
            leaves["up"],
            self.alpha / self.rank,
            gradients=(gradients["down"], gradients["up"]),
        )

    def change(self, tensors: Mapping[str, Tensor]) -> LowRank:
        """See ``Trainable``."""
        return LowRank(down=tensors["down"], up=tensors["up"], alpha=self.alpha)


def kaiming_uniform(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """(rank, in) float32 from U(-1/√in, 1/√in), as ``kaiming_uniform_(a=√5)`` (He et al. 2015): by (seed, name) alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    bound = 1 / math.sqrt(shape[1])
    values = np.random.Generator(np.random.Philox(key=key)).uniform(-bound, bound, shape)
    return torch.from_numpy(values.astype(np.float32))
