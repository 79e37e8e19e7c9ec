"""The layers that a run trains, before its first step."""

from __future__ import annotations

from ..base.base import Base
from ..config.sections import Config
from ..lora.adapter import Adapter, choose_targets


def new_adapter(base: Base, config: Config) -> tuple[Adapter, list[float]]:
    """A fresh adapter on the parts that are trained, and the learning rate of each of its parameters."""
    targets, parts = choose_targets(base.modules(), config.lora.targets), trained_parts(base, config)
    groups = [{n: m for n, m in targets.items() if n.startswith(f"{part}.")} for part in parts]
    adapter = Adapter(groups, rank=config.lora.rank, alpha=config.lora.alpha, seed=config.train.seed)
    return adapter, list(parts.values())


def trained_parts(base: Base, config: Config) -> dict[str, float]:
    """Part of ``base`` -> its peak learning rate, of those that are trained, in the order of an adapter's parameters."""
    text_encoder_rate = config.optimizer.text_encoder_rate(base.checkpoint.family)
    rates = {"unet": config.optimizer.learning_rate}
    rates |= {encoder.facts.part: text_encoder_rate for encoder in base.text_encoders}
    return {part: rate for part, rate in rates.items() if rate}
