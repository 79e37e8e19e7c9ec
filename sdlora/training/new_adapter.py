"""The layers that a run trains, before its first step."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.base import Base
from ..config.sections import Config
from ..lora.adapter import Adapter
from ..lora.low_rank_trainable import TrainableLowRank
from ..lora.targets import choose_targets
from ..lora.trainable import Trainable


@dataclass(frozen=True, kw_only=True)
class RateGroup:
    """Trained tensors of one part that have the same learning rate."""

    part: str
    """``unet`` or a text encoder."""
    rate: float
    """Peak learning rate."""


def new_adapter(base: Base, config: Config) -> Adapter[RateGroup]:
    """A fresh adapter on the parts that are trained."""
    parts = trained_parts(base, config)
    return Adapter(
        new_trainables(base, config),
        seed=config.train.seed,
        group_of=lambda name, tensor: RateGroup(part=part_of(name), rate=parts[part_of(name)]),
    )


def new_trainables(base: Base, config: Config) -> dict[str, Trainable]:
    """Canonical name -> what is trained of that module, part after part."""
    lora, targets = config.lora, choose_targets(base.modules(), config.lora.targets)
    return {
        name: TrainableLowRank(module=module, rank=lora.rank, alpha=lora.alpha)
        for part in trained_parts(base, config)
        for name, module in targets.items()
        if part_of(name) == part
    }


def part_of(name: str) -> str:
    """Part of the base that the module with this canonical name belongs to."""
    return name.partition(".")[0]


def trained_parts(base: Base, config: Config) -> dict[str, float]:
    """Part of ``base`` -> its peak learning rate, of those that are trained, in the order of an adapter's parameters."""
    text_encoder_rate = config.optimizer.text_encoder_rate(base.checkpoint.family)
    rates = {"unet": config.optimizer.learning_rate}
    rates |= {encoder.facts.part: text_encoder_rate for encoder in base.text_encoders}
    return {part: rate for part, rate in rates.items() if rate}
