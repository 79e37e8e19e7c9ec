"""The trainable form of a module, by the kind of the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .adapted_layer import FrozenLayer
from .decomposed_trainable import TrainableDecomposed
from .hadamard_trainable import TrainableHadamard
from .kronecker_trainable import TrainableKronecker
from .low_rank_trainable import TrainableLowRank
from .trainable import Trainable


@dataclass(frozen=True, kw_only=True)
class KindSettings:
    """What is the same for all modules of an adapter."""

    kind: Literal["lora", "locon", "dora", "loha", "lokr"] = "lora"
    factor: int = -1
    """For LoKr; see ``kronecker_trainable.divided``."""


def trainable_for(name: str, module: nn.Module, settings: KindSettings, *, rank: int, alpha: float) -> Trainable:
    """What is trained of ``module``, a linear layer or a convolution with the canonical ``name``.

    Raises:
        TypeError: it is neither, or a convolution in groups.
    """
    if not isinstance(module, FrozenLayer) or (isinstance(module, nn.Conv2d) and module.groups != 1):
        raise TypeError(f"{name}: {type(module).__name__} is no linear layer and no convolution without groups")
    if settings.kind == "loha":
        return TrainableHadamard(module=module, rank=rank, alpha=alpha)
    if settings.kind == "lokr":
        return TrainableKronecker(module=module, rank=rank, alpha=alpha, factor=settings.factor)
    if settings.kind == "dora":
        return TrainableDecomposed(direction=TrainableLowRank(module=module, rank=rank, alpha=alpha))
    return TrainableLowRank(module=module, rank=rank, alpha=alpha)
