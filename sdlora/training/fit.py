"""The choice of a step's shape."""

from __future__ import annotations

from ..config.sections import TrainSection
from .step_shape import StepShape


def choose_shape(train: TrainSection, recorded: StepShape | None = None) -> StepShape:
    """The shape that ``train`` asks for; what it leaves open is that of a resumed run's steps so far, ``recorded``."""
    known = recorded or StepShape(micro_batch=train.batch_size, checkpointing=False)
    micro_batch, checkpointing = train.micro_batch, train.gradient_checkpointing
    return StepShape(
        micro_batch=min(known.micro_batch if micro_batch == "auto" else micro_batch, train.batch_size),
        checkpointing=known.checkpointing if checkpointing == "auto" else checkpointing,
    )
