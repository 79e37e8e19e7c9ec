"""What fits into the device's memory: the shape of a step, and what is kept there beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..config.sections import TrainSection
from .step_shape import StepShape

CONTEXT = 0.5e9
"""Bytes that torch and the device's libraries take for themselves."""
ROUNDED_UP = 1.1
"""What an allocator takes for each byte that a step needs: it rounds up, and cannot reuse every gap."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A shape, and bytes of the device for what is computed once and read in each step."""

    shape: StepShape
    room: float
    line: str
    """What was chosen and why, for people; "" where nothing had to be chosen."""


def choose_fit(
    train: TrainSection,
    *,
    images: int,
    free: float,
    needed: Callable[[StepShape], float],
    recorded: StepShape | None,
) -> Fit:
    """The shape that ``train`` asks for; what it leaves open is chosen so that a step fits into ``free`` bytes.

    Smaller micro-batches are tried before gradient checkpointing: on a GPU they cost less time. Without a limit, as on a
    CPU, a step is the whole batch without checkpointing.

    Args:
        images: number of images of a batch that one process computes.
        free: bytes of the device, with nothing of the base on it; may be infinite.
        needed: bytes that a step of a shape needs, by arithmetic.
        recorded: the shape of a resumed run's steps so far, which takes the place of choosing.
    """
    if math.isinf(free):
        return Fit(
            shape=_shape(train, recorded or StepShape(micro_batch=images, checkpointing=False)), room=math.inf, line=""
        )
    choices = (recorded,) if recorded else _choices(images)
    shapes = tuple(dict.fromkeys(_shape(train, choice) for choice in choices))
    fitting = [shape for shape in shapes if taken(needed(shape)) <= free]
    shape = fitting[0] if fitting else shapes[-1]
    room = max(0.0, free - taken(needed(shape))) / 2
    if "auto" not in (train.micro_batch, train.gradient_checkpointing):
        return Fit(shape=shape, room=room, line="")
    parts = [
        f"{shape} of a batch of {train.batch_size}: {_gigabytes(taken(needed(shape)))}, free are {_gigabytes(free)}"
    ]
    if recorded:
        parts.append("as in the steps before")
    elif shape != shapes[0] and fitting:
        parts.append(f"{shapes[0]} would need {_gigabytes(taken(needed(shapes[0])))}")
    if not fitting:
        parts.append("it may not fit; lower data.resolution or lora.rank, or use a GPU with more memory")
    return Fit(shape=shape, room=room, line=f"memory: {'; '.join(parts)}")


def _choices(images: int) -> list[StepShape]:
    """Shapes in the order in which they are tried."""
    shapes = [StepShape(micro_batch=images, checkpointing=False)]
    while shapes[-1].micro_batch > 1:
        shapes.append(StepShape(micro_batch=shapes[-1].micro_batch // 2, checkpointing=False))
    return [*shapes, *(StepShape(micro_batch=shape.micro_batch, checkpointing=True) for shape in shapes)]


def _shape(train: TrainSection, choice: StepShape) -> StepShape:
    """``choice`` where ``train`` leaves it open."""
    micro_batch, checkpointing = train.micro_batch, train.gradient_checkpointing
    return StepShape(
        micro_batch=min(choice.micro_batch if micro_batch == "auto" else micro_batch, train.batch_size),
        checkpointing=choice.checkpointing if checkpointing == "auto" else checkpointing,
    )


def taken(needed: float) -> float:
    """Bytes of a GPU that are taken where a computation needs ``needed``."""
    return needed * ROUNDED_UP + CONTEXT


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
