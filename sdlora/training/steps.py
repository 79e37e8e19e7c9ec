"""The steps of a run, one after another, until they are done or the run has to stop."""

from __future__ import annotations

import threading

import torch
from accelerate import Accelerator

from ..errors import DeviceMemoryError, Interrupted, ProcessLostError, TrainingError
from ..progress import Progress
from .between_steps import BetweenSteps
from .checkpoint import Checkpoint
from .fitted_steps import FittedSteps
from .interruption import InterruptFlag, interrupt_flag
from .processes import add_up, wait_for_all
from .saving import RunFiles
from .session import TrainingSession

REPORT_EVERY = 10
"""Steps between readings of the loss: each reading waits for the device."""
MAX_SKIPPED_SHARE = 0.5


def train_steps(
    fitted: FittedSteps,
    start: Checkpoint,
    files: RunFiles,
    progress: Progress,
    stop: threading.Event | None = None,
) -> torch.Tensor:
    """Do every step after ``start``, or those until ``validation.stop`` ends the run.

    Returns the loss of each, (steps done here,) float32 on the device.

    The state after the last step is saved too, so nothing is lost if the file cannot be written. A checkpoint that cannot
    be written is a warning. Where memory or another process is missing, the state after the last whole step is saved.

    Raises:
        DeviceMemoryError: not enough memory for a step, or, with ``train.fit``, for one image at once.
        ProcessLostError: another process of the run has ended.
        TrainingError: half of the steps produced gradients with NaN or Inf.
        Interrupted: Ctrl-C, SIGTERM or ``stop``; the state is saved.
    """
    steps = fitted.session.plan.steps
    between = BetweenSteps(fitted, start, files, progress)
    with interrupt_flag(stop) as interrupted:
        try:
            _do_steps(fitted, files, between, interrupted, started_at=start.started_at)
            between.read()
            _check_skipped(fitted.session, between.done)
            between.save()
        except DeviceMemoryError:
            between.save_here()
            raise
        except ProcessLostError as error:
            where = f"stopped after step {between.done} of {steps}{between.save_here()}"
            raise ProcessLostError(f"{error}; {where}; run the same command to resume") from None
    return between.losses


def _do_steps(
    fitted: FittedSteps, files: RunFiles, between: BetweenSteps, interrupted: InterruptFlag, *, started_at: float
) -> None:
    train, accelerator, steps = fitted.session.plan.config.train, fitted.session.accelerator, fitted.session.plan.steps
    between.look(interrupted)
    while between.done < steps and not files.validation.over:
        between.step_done(fitted.step(between.done))
        done = between.done
        if done % REPORT_EVERY == 0 or done == steps:
            between.read()
        if accelerator.is_main_process:
            files.exports.write(done, fitted.session, started_at=started_at)
        if done % train.save_every == 0 and done < steps:
            _check_skipped(fitted.session, done)
            between.save()
        between.look(interrupted)
        if done < steps and _all_stop(accelerator, interrupted, done):
            between.read()  # The log has every step that the state has.
            unsaved = between.save_here()
            wait_for_all(accelerator)
            text = f"stopped after step {done} of {steps}{unsaved}; run the same command to resume"
            raise Interrupted(text, terminated=interrupted.terminated)


def _all_stop(accelerator: Accelerator, interrupted: InterruptFlag, done: int) -> bool:
    """Whether to stop after ``done`` steps: the same in every process, so that none waits for one that has stopped.

    Several processes compare their flags; on a GPU only where the loss is read, as that waits for the device anyway.
    """
    if accelerator.num_processes == 1:
        return interrupted.is_set()
    if accelerator.device.type != "cpu" and done % REPORT_EVERY:
        return False
    flags = torch.tensor([float(interrupted.is_set()), float(interrupted.terminated)], device=accelerator.device)
    add_up(flags)
    pressed, terminated = flags.tolist()
    interrupted.terminated = terminated > 0
    return pressed > 0


def _check_skipped(session: TrainingSession, done: int) -> None:
    """Steps that only lowered the loss scale count where the run ends without any other."""
    skipped, settling = session.optimizer.skipped_steps(), session.optimizer.settling_steps()
    nothing_learned = skipped == done == session.plan.steps
    if nothing_learned or skipped - settling > MAX_SKIPPED_SHARE * done:
        raise TrainingError(
            f"{skipped} of {done} steps produced gradients with NaN or Inf and were skipped; lower "
            "optimizer.learning_rate, or set train.precision to float32"
        )
