"""What a run writes while it goes on."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .checkpoint import Checkpoint, RunFolder
from .exports import Exports
from .records import Records
from .session import TrainingSession
from .shortage import why_not_written

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFiles:
    """The places of what is written before the last step."""

    folder: RunFolder
    """State to resume from."""
    exports: Exports
    """LoRA files on the way."""
    records: Records
    """The log of the losses."""


def save_state(folder: RunFolder, start: Checkpoint, done: int, session: TrainingSession) -> str:
    """Save the state after ``done`` steps; what cannot be saved is a warning, returned as part of a sentence too."""
    state = session.optimizer.state
    try:
        folder.save(Checkpoint(step=done, started_at=start.started_at, tensors=state(), shape=session.shape))
    except (OSError, RuntimeError, MemoryError) as error:
        failed = f"step {done} cannot be saved ({why_not_written(error)}); kept: {folder.place()}"
        logger.warning("%s", failed)
        return f", but {failed}"
    return ""
