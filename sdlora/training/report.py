"""What a call of ``train`` did, also where the run was complete already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from .checkpoint import RunFolder
from .file_check import FileCheck
from .plan import RunPlan
from .processes import wait_for_all
from .texts import changed_metadata, write_texts


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a call of ``train`` did, and where its file is."""

    output: Path
    steps: int
    """Steps that were done in all calls; fewer than ``train.steps`` where ``validation.stop`` ended the run."""
    file_step: int
    """Steps after which the weights were those in the file; fewer where ``validation.stop`` keeps the best."""
    seconds: float
    """Time that this call spent on loading, encoding and training."""
    loss: float | None
    """Mean over the last 10 % of the steps; None where this call did no step."""
    validation_loss: float | None
    """Mean over the validation images with the weights in the file; None without such images, or where the run was
    complete."""
    resumed_from: int
    """Steps that an earlier, interrupted call had done."""
    warning: str | None = None
    """That the run learned nothing or diverged, and the likely cause; None where nothing is known against it."""
    check: FileCheck | None = None
    """What the file changes in the base, found by reading it back; None where this call wrote none."""
    texts_written: bool = False
    """Whether the run was complete already, and new texts of ``[output]`` were written into its file."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What ``train`` made: the run's result, and the sample sheet, or None where none was made."""

    result: TrainResult
    samples: Path | None


def complete_already(plan: RunPlan, folder: RunFolder) -> TrainResult:
    """The result of a run whose file exists; new texts are written into it."""
    output, processes = Path(plan.config.output.path), Accelerator()
    metadata = changed_metadata(output, plan.config)
    # Every process has read the file before one changes it.
    wait_for_all(processes)
    if processes.is_main_process:
        folder.close(plan.steps, keep=plan.config.train.keep_state)
        if metadata is not None:
            write_texts(output, metadata, plan.identity)
    return TrainResult(
        output=output,
        steps=plan.steps,
        file_step=plan.steps,
        seconds=0.0,
        loss=None,
        validation_loss=None,
        resumed_from=0,
        texts_written=metadata is not None,
    )
