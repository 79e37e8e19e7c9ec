"""The layers that a run trains, before its first step."""

from __future__ import annotations

from ..base.base import Base
from ..config.sections import Config
from ..lora.adapter import Adapter, choose_targets


def new_adapter(base: Base, config: Config) -> tuple[Adapter, list[float]]:
    """A fresh adapter on the parts that are trained, and the learning rate of each of its parameters."""
    targets = choose_targets(base.modules(), config.lora.targets)
    parts = {"unet": config.optimizer.learning_rate}
    text_encoder_rate = config.optimizer.text_encoder_rate(base.checkpoint.family)
    parts |= {encoder.facts.part: text_encoder_rate for encoder in base.text_encoders}
    groups = [
        ({n: m for n, m in targets.items() if n.startswith(f"{part}.")}, rate) for part, rate in parts.items() if rate
    ]
    adapter = Adapter(
        [group for group, _ in groups], rank=config.lora.rank, alpha=config.lora.alpha, seed=config.train.seed
    )
    return adapter, [rate for _, rate in groups]
