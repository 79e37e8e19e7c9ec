"""The layers that a run trains, before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from ..base.base import Base
from ..config.sections import Config, LoraSection
from ..lora.adapter import Adapter
from ..lora.change import Change
from ..lora.dropout import AdapterDropout, DropoutRates
from ..lora.low_rank_trainable import TrainableLowRank
from ..lora.new_trainable import KindSettings, trainable_for
from ..lora.quantized import FrozenLinear
from ..lora.relative_trainable import TrainableRelative
from ..lora.started_trainable import StartedTrainable
from ..lora.trainable import Trainable
from .module_choice import ModuleChoice, choose_modules, part_of


@dataclass(frozen=True, kw_only=True)
class RateGroup:
    """Trained tensors of one part that have the same learning rate."""

    part: str
    """``unet`` or a text encoder."""
    rate: float
    """Peak learning rate."""


def new_adapter(base: Base, config: Config, start: Mapping[str, Change] = MappingProxyType({})) -> Adapter[RateGroup]:
    """A fresh adapter on the modules that are trained; those in ``start``, by canonical names, start from that."""
    chosen, ratio = choose_modules(base.checkpoint, config), config.optimizer.lora_plus_ratio

    def group_of(name: str, tensor: str) -> RateGroup:
        return RateGroup(part=part_of(name), rate=chosen[name].rate * (ratio if tensor == "up" else 1.0))

    dropout = AdapterDropout(dropout_rates(config.lora))
    trainables = new_trainables(base, config, start, dropout)
    return Adapter(trainables, seed=config.train.seed, group_of=group_of, dropout=dropout)


def dropout_rates(section: LoraSection) -> DropoutRates:
    """What ``section`` leaves out in each step."""
    return DropoutRates(values=section.dropout, ranks=section.rank_dropout, modules=section.module_dropout)


def new_trainables(
    base: Base,
    config: Config,
    start: Mapping[str, Change] = MappingProxyType({}),
    dropout: AdapterDropout | None = None,
) -> dict[str, Trainable]:
    """Canonical name -> what is trained of that module, part after part, with ``dropout``."""
    modules = base.modules()
    return {
        name: _trainable(name, modules[name], choice, config, start.get(name), dropout)
        for name, choice in choose_modules(base.checkpoint, config).items()
    }


def _trainable(
    name: str,
    module: nn.Module,
    choice: ModuleChoice,
    config: Config,
    start: Change | None,
    dropout: AdapterDropout | None,
) -> Trainable:
    init, rank, alpha = config.lora.init, choice.rank, choice.alpha
    if init in ("pissa", "orthogonal") and isinstance(module, FrozenLinear):
        return TrainableRelative(
            module=module,
            rank=rank,
            alpha=alpha,
            init=init,
            name=name,
            seed=config.train.seed,
            dropout=None if dropout is None else dropout.of(name),
        )
    lora = config.lora
    kind = KindSettings(kind=lora.kind, factor=lora.factor, dropout=dropout, gaussian=init == "gaussian")
    fresh = trainable_for(name, module, kind, rank=rank, alpha=alpha)
    if start is None or not isinstance(fresh, TrainableLowRank):
        return fresh
    return StartedTrainable(fresh=fresh, change_of_file=start)
