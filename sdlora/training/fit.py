"""The choice of a step's shape."""

from __future__ import annotations

from ..config.sections import TrainSection
from .step_shape import StepShape


def choose_shape(train: TrainSection) -> StepShape:
    """The shape that ``train`` asks for."""
    return StepShape(
        micro_batch=train.batch_size if train.micro_batch == "auto" else min(train.micro_batch, train.batch_size),
        checkpointing=train.gradient_checkpointing is True,
    )
