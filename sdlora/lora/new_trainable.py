"""The trainable form of a module, by the kind of the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .adapted_layer import FrozenLayer
from .decomposed_trainable import TrainableDecomposed
from .dropout import AdapterDropout
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
    dropout: AdapterDropout | None = None
    gaussian: bool = False
    """See ``TrainableLowRank``."""


def trainable_for(name: str, module: nn.Module, settings: KindSettings, *, rank: int, alpha: float) -> Trainable:
    """What is trained of ``module``, a linear layer or a convolution with the canonical ``name``.

    Raises:
        TypeError: it is neither, or a convolution in groups.
    """
    if not isinstance(module, FrozenLayer) or (isinstance(module, nn.Conv2d) and module.groups != 1):
        raise TypeError(f"{name}: {type(module).__name__} is no linear layer and no convolution without groups")
    dropout = None if settings.dropout is None else settings.dropout.of(name)
    if settings.kind == "loha":
        return TrainableHadamard(module=module, rank=rank, alpha=alpha, dropout=dropout)
    if settings.kind == "lokr":
        return TrainableKronecker(module=module, rank=rank, alpha=alpha, factor=settings.factor, dropout=dropout)
    low_rank = TrainableLowRank(module=module, rank=rank, alpha=alpha, dropout=dropout, gaussian=settings.gaussian)
    return TrainableDecomposed(direction=low_rank) if settings.kind == "dora" else low_rank
