"""Saving the state of a run while it goes on."""

from __future__ import annotations

import logging

from ..base.device_memory import out_of_memory
from .checkpoint import Checkpoint, RunFolder
from .session import TrainingSession

logger = logging.getLogger(__name__)


def save_state(folder: RunFolder, start: Checkpoint, done: int, session: TrainingSession) -> str:
    """Save the state after ``done`` steps; what cannot be saved is a warning, returned as part of a sentence too."""
    state = session.optimizer.state
    try:
        folder.save(Checkpoint(step=done, started_at=start.started_at, tensors=state(), shape=session.shape))
    except (OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, OSError) and not out_of_memory(error):
            raise
        reason = (error.strerror or error) if isinstance(error, OSError) else "out of memory"
        failed = f"step {done} cannot be saved ({reason}); kept: {folder.place()}"
        logger.warning("%s", failed)
        return f", but {failed}"
    return ""
