"""The public function ``train``: examine the images, plan the run, train the LoRA, generate samples."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.gpu_build import why_not_cuda
from ..config.loading import as_config
from ..config.sections import Config
from ..data.findings import raise_errors
from ..errors import ConfigError
from ..files import check_target
from ..lint.dataset import ExaminedDataset
from ..lint.report import LintReport, summary_lines
from ..lint.run import examine_dataset
from ..progress import Progress, Silence, progress_or_bar, raise_if_stopped

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .plan import RunPlan
    from .records import StepRecord
    from .report import TrainReport
    from .validation_record import ValidationRecord


def train(
    config: Config | str | Path,
    *,
    restart: bool = False,
    extend: int | None = None,
    allow_device_change: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_validation: Callable[[ValidationRecord], None] | None = None,
) -> TrainReport:
    """Train a LoRA, or resume its training, and write the file ``config.output.path``.

    Processes that ``torchrun`` started share the batch of each step, and the result is that of one process up to rounding.
    Only the first of them reports and writes; see ``docs/several-devices.md``.

    Args:
        config: a configuration, or the path of its TOML file.
        restart: start over, whatever an earlier run left.
        extend: go on with a finished or half-done run for as many steps more; see ``sdlora.training.extension``.
        allow_device_change: resume a half-done run on another type of device or in another precision too.
        progress: receives reports; by default a bar in a terminal.
        stop: set it, from any thread, to save and stop after the current step, as Ctrl-C does in the main thread.
        say: called with what is worth knowing about the images and captions, and with the length of the run, line by line,
            with a warning of an NVIDIA card that cannot be used, and with the device, the precision and the free memory,
            before a model is loaded; and after the training with a warning where the losses say that it failed.
        on_step: called with each step's loss and learning rates, in order; every few steps, when the losses are read.
        on_validation: called with each measurement of the validation loss; see ``validation.every``.

    Raises:
        SdloraError: a fault of the input, found before a model is loaded wherever that is possible.
        ProcessLostError: another process has ended; the first one has saved the state, if it is this one.
        Interrupted: Ctrl-C or ``stop``; the state is saved, and the same call resumes from it.
    """
    config = as_config(config, "train")
    _check_extension(extend, restart=restart)
    group, output = _joined(config), Path(config.output.path)
    is_main, say = group.is_main_process, say if group.is_main_process else _nothing
    with progress_or_bar(progress if is_main else Silence()) as reports:
        dataset = examine_dataset(config, progress=reports)
        raise_errors(dataset.findings)
        # Imported late since they bring diffusers: faults of the input are reported before.
        from .determinism import deterministic_algorithms
        from .extension import continued
        from .lock import locked
        from .loop import run_training
        from .plan import plan_run
        from .processes import check_batch

        plan = plan_run(config, dataset) if restart else continued(plan_run(config, dataset), extend=extend)
        uneven = check_batch(plan.batches.batch_size, group.num_processes)
        for line in [*_known(dataset, plan), *uneven]:
            say(line)
        raise_if_stopped(stop, "stopped before the first step; run the same command to start")
        with locked(output) if is_main else nullcontext(), deterministic_algorithms(plan.config.train.deterministic):
            report = run_training(
                plan,
                restart=restart,
                progress=reports,
                stop=stop,
                allow_device_change=allow_device_change,
                say=say,
                on_step=on_step,
                on_validation=on_validation,
            )
        if report.result.warning:
            say(f"warning: {report.result.warning}")
        return report


def _joined(config: Config) -> Accelerator:
    """The processes that share the run. The first of them finds out whether the output can be written."""
    from .processes import join_processes

    group = join_processes()
    if group.is_main_process:
        check_target(Path(config.output.path))
    return group


def _nothing(line: str) -> None:
    """What a process says that is not the first."""


def _known(dataset: ExaminedDataset, plan: RunPlan) -> list[str]:
    """What is worth knowing before a model is loaded: of the images and captions, the start, the length and the device."""
    planned = plan.findings[len(dataset.findings) :]
    known = [
        *summary_lines(LintReport(dataset=dataset)),
        *map(str, planned),
        *plan.start_in_words,
        plan.length_in_words,
    ]
    unused = why_not_cuda()
    return [*known, f"warning: {unused}"] if unused else known


def _check_extension(extend: int | None, *, restart: bool) -> None:
    """Whether ``--extend`` can be followed.

    Raises:
        ConfigError: it is less than one step, or the run is to start over.
    """
    if extend is None:
        return
    if type(extend) is not int or extend < 1:
        raise ConfigError(f"--extend {extend}: expected a whole number of steps, at least 1, for example 500")
    if restart:
        raise ConfigError("--extend goes on with a run, --restart starts over; give one of them")
