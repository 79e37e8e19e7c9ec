"""What a run writes before it is complete, and the saving of its state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint, RunFolder
from .exports import Exports
from .plan import RunPlan
from .records import Records, StepRecord
from .sample_sheet import SamplesOnTheWay
from .session import TrainingSession
from .shortage import why_not_written
from .validation_course import ValidationCourse
from .validation_record import ValidationRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFiles:
    """What a run writes before it is complete."""

    folder: RunFolder
    """The state to resume from."""
    exports: Exports
    """LoRA files on the way."""
    records: Records
    """The log of the losses."""
    samples: SamplesOnTheWay
    """Rows of the sample sheet on the way."""
    validation: ValidationCourse
    """Measurements on the validation images, a part of the state to resume from."""

    @classmethod
    def of(
        cls,
        plan: RunPlan,
        on_step: Callable[[StepRecord], None] | None = None,
        on_validation: Callable[[ValidationRecord], None] | None = None,
        *,
        main: bool = True,
    ) -> RunFiles:
        """Those of ``plan``; the others as for ``Records``."""
        records = Records(plan, on_step, on_validation, main=main)
        folder = RunFolder(Path(plan.config.output.path), plan.identity)
        return cls(
            folder=folder,
            exports=Exports(plan, folder),
            records=records,
            samples=SamplesOnTheWay(plan),
            validation=ValidationCourse(plan, records),
        )

    def remove(self) -> None:
        """Remove what earlier runs for this output wrote on their way."""
        self.folder.remove()
        self.exports.remove()
        self.samples.remove()

    def open(self, start: Checkpoint) -> None:
        """Go on from ``start``.

        Raises:
            ResumeError: a file of others is where this run would write.
        """
        self.exports.check()
        self.records.open(start)
        self.validation.restore(start.tensors)


def save_state(files: RunFiles, start: Checkpoint, done: int, session: TrainingSession) -> str:
    """Save the state after ``done`` steps; what cannot be saved is a warning, returned as part of a sentence too."""
    folder = files.folder
    try:
        tensors = {**session.optimizer.state(), **session.adapter.fixed, **files.validation.state()}
        folder.save(
            Checkpoint(
                step=done,
                started_at=start.started_at,
                tensors=tensors,
                shape=session.shape,
                processes=session.accelerator.num_processes,
            )
        )
    except (OSError, RuntimeError, MemoryError) as error:
        failed = f"step {done} cannot be saved ({why_not_written(error)}); kept: {folder.place()}"
        logger.warning("%s", failed)
        return f", but {failed}"
    return ""
