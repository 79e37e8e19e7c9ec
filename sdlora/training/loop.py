"""A training run, from a plan to a LoRA file and its samples, top to bottom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from ..base.base import Base
from ..base.device import device_facts
from ..base.device_memory import cast, move_to
from ..base.load import decoding_dtype, load_base
from ..base.precision import describe_precision, explain_precision
from ..errors import CompatibilityError, DeviceMemoryError, Interrupted, LoraFileError, TargetError, TrainingError
from ..families import WORDS_IN_CHUNK
from ..lora.change import Change
from ..progress import Progress
from .between_steps import BetweenSteps
from .checkpoint import RUN_KEY, Checkpoint, RunFolder, finished, forget_run, record_run
from .course import own_losses, run_warning, tail_length
from .exports import write_run_file
from .file_check import FileCheck, check_file
from .fitted_steps import FittedSteps, fitted
from .interruption import InterruptFlag, interrupt_flag
from .plan import RunPlan
from .records import StepRecord
from .report import TrainReport, TrainResult, complete_already
from .sample_sheet import draw_samples, lacks_samples
from .samples import check_samples
from .saving import RunFiles
from .session import TrainingSession, open_session
from .shortage import CLOSE_OTHERS, explained
from .tracker import check_tracker
from .validation import validation_loss
from .validation_course import check_validation
from .validation_record import ValidationRecord

REPORT_EVERY = 10
"""Steps between readings of the loss: each reading waits for the device."""
MAX_SKIPPED_SHARE = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedLora:
    """The outcome of the steps. ``weights`` are float32 on the CPU, by canonical module name."""

    weights: Mapping[str, Change]
    caption_tokens: int
    """Tokens of a caption that were read, at most."""
    started_at: float
    """Seconds since 1970 when the first of all calls started."""
    resumed_from: int
    steps: int
    """Steps that were done in all calls."""
    step: int
    """Steps after which the weights were ``weights``."""
    loss: float | None
    warning: str | None
    validation_loss: float | None


def run_training(
    plan: RunPlan,
    *,
    restart: bool,
    progress: Progress,
    stop: threading.Event | None,
    allow_device_change: bool = False,
    say: Callable[[str], None] = lambda line: None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_validation: Callable[[ValidationRecord], None] | None = None,
) -> TrainReport:
    """Train as planned, resuming from the newest checkpoint, and write the LoRA file and its samples.

    Raises:
        ResumeError: output or checkpoints of another run are in the way, or checkpoints of another type of device or
            another precision, unless ``allow_device_change``.
        TrainingError: half of the steps produced gradients with NaN or Inf.
        TargetError: the file cannot be written; the message names the checkpoint that has the weights.
        DeviceMemoryError: not enough memory; the message says where, and what to change. The state is saved.
        Interrupted: Ctrl-C, SIGTERM or ``stop``; the state is saved.
    """
    began, config = time.time(), plan.config
    output = Path(config.output.path)
    accelerator = Accelerator()
    facts = device_facts(accelerator.device)
    chosen = explain_precision(config.train.precision, facts, unet_parameters=plan.base.unet_parameters)
    plan = replace(plan, identity=plan.identity.on(facts.kind, chosen.dtype))
    files = RunFiles.of(plan, on_step, on_validation, main=accelerator.is_main_process)
    folder = files.folder
    check_samples(plan)
    check_validation(plan)
    check_tracker(config.output)
    loaded = partial(load_base, plan.base, device=accelerator.device, dtype=chosen.dtype)
    if restart:
        files.remove()
    elif finished(output, plan.identity):
        result = complete_already(plan, folder)
        wanted = accelerator.is_main_process and lacks_samples(plan)
        drawn = draw_samples(plan, loaded, progress=progress, stop=stop) if wanted else None
        return TrainReport(result=result, samples=drawn)
    start = folder.newest(allow_device_change=allow_device_change) or Checkpoint.none(began)
    files.open(start)
    say(describe_precision(facts, chosen))
    with explained("loading the base", CLOSE_OTHERS):
        # Its parts are in main memory until they work, and its VAE encodes in float32.
        base = loaded(vae_dtype=torch.float32, home=torch.device("cpu"))
    trained = train_lora(plan, base, accelerator, files, start, progress, stop, say)
    check = None
    if accelerator.is_main_process:
        check = _written_and_checked(plan, base, trained, folder, progress)
        folder.close(plan.steps, keep=config.train.keep_state)
    accelerator.wait_for_everyone()
    result = _result(output, trained, check, seconds=time.time() - began)
    if not accelerator.is_main_process:
        return TrainReport(result=result, samples=None)
    drawn = draw_samples(plan, lambda: _complete(base), progress=progress, stop=stop)
    return TrainReport(result=result, samples=drawn)


def _written_and_checked(
    plan: RunPlan, base: Base, trained: TrainedLora, folder: RunFolder, progress: Progress
) -> FileCheck:
    """Write the output and read it back; where that fails there is no output, and the state of the run is kept."""
    output = Path(plan.config.output.path)
    try:
        with explained(f"writing {output}", f"its weights are kept: {folder.place()}; {CLOSE_OTHERS}"):
            _write_output(plan, base, trained, progress)
            return check_file(output, plan, base, trained.weights, progress)
    except OSError as error:
        raise TargetError(
            f"{output}: cannot be written ({error.strerror or error}); the newest checkpoint is kept: "
            f"{folder.place()}; make space, then run the same command to resume from it"
        ) from None
    except (LoraFileError, CompatibilityError) as error:
        output.unlink(missing_ok=True)
        forget_run(output)
        kept = f"{output}: not written; the newest checkpoint is kept: {folder.place()}"
        diverged = "if the run has diverged, lower optimizer.learning_rate and start over with --restart"
        raise TrainingError([*error.problems, f"{kept}; {diverged}"]) from None


def _result(output: Path, trained: TrainedLora, check: FileCheck | None, *, seconds: float) -> TrainResult:
    return TrainResult(
        output=output,
        steps=trained.steps,
        file_step=trained.step,
        seconds=seconds,
        loss=trained.loss,
        validation_loss=trained.validation_loss,
        resumed_from=trained.resumed_from,
        check=check,
        warning=trained.warning or (check.warning(trained.step) if check else None),
    )


def _complete(base: Base) -> Base:
    """``base`` with all parts on its device, and the VAE as for generating."""
    cast(decoding_dtype(base.dtype, base.device), base.vae)
    move_to(base.device, base.unet, base.vae, *base.encoder_models())
    return base


def train_lora(
    plan: RunPlan,
    base: Base,
    accelerator: Accelerator,
    files: RunFiles,
    start: Checkpoint,
    progress: Progress,
    stop: threading.Event | None,
    say: Callable[[str], None],
) -> TrainedLora:
    """Do every step after ``start``, and the validation. ``base`` is unchanged on return.

    Images, embeddings and optimizer are released on return, before samples need the memory.
    """
    session = open_session(plan, base, accelerator, progress, first=start.step, recorded=start.shape, say=say)
    if start.step:
        session.optimizer.restore(start.tensors)
    try:
        with fitted(session) as fitting:
            losses = train_steps(fitting, start, files, progress, stop)
            measuring = explained("measuring losses after the last step", CLOSE_OTHERS)
            with measuring, files.validation.resulting(session) as measured:
                held_out = validation_loss(session, progress) if measured is None else measured.loss
                own = own_losses(session, progress)
                weights = session.adapter.changes()
        with explained("measuring losses after the last step", CLOSE_OTHERS):
            alone = own_losses(session, progress)
    finally:
        session.embeddings.close()
        files.records.close()
    done = start.step + len(losses)
    return TrainedLora(
        weights=weights,
        caption_tokens=WORDS_IN_CHUNK * session.embeddings.chunks,
        started_at=start.started_at,
        resumed_from=start.step,
        steps=done,
        step=done if measured is None else measured.step,
        loss=losses[-tail_length(done) :].mean().item() if len(losses) else None,
        warning=run_warning(trained=own, alone=alone) if own and alone else None,
        validation_loss=held_out,
    )


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
    be written is a warning. Before a step for which there is not enough memory, the state is saved.

    Raises:
        DeviceMemoryError: not enough memory for a step, or, with ``train.fit``, for one image at once.
    """
    train, accelerator = fitted.session.plan.config.train, fitted.session.accelerator
    steps, first, done = fitted.session.plan.steps, start.step, start.step
    between = BetweenSteps(fitted, start, files, progress)
    with interrupt_flag(stop) as interrupted:
        between.look(first, interrupted)
        while done < steps and not files.validation.over:
            step = done
            try:
                loss = fitted.step(step)
            except DeviceMemoryError:
                if step > first:
                    between.save(step)
                raise
            done += 1
            between.losses[step - first] = loss
            if done % REPORT_EVERY == 0 or done == steps:
                between.read(done)
            if accelerator.is_main_process:
                files.exports.write(done, fitted.session, started_at=start.started_at)
            if done % train.save_every == 0 and done < steps:
                _check_skipped(fitted.session, done)
                between.save(done)
            between.look(done, interrupted)
            if done < steps and _all_stop(accelerator, interrupted, done):
                unsaved = between.save(done)
                accelerator.wait_for_everyone()
                text = f"stopped after step {done} of {steps}{unsaved}; run the same command to resume"
                raise Interrupted(text, terminated=interrupted.terminated)
    between.read(done)
    _check_skipped(fitted.session, done)
    if first < done:
        between.save(done)
    return between.losses[: done - first]


def _all_stop(accelerator: Accelerator, interrupted: InterruptFlag, done: int) -> bool:
    """Whether to stop after ``done`` steps: the same in every process, so that none waits for one that has stopped.

    Several processes compare their flags only where the loss is read, as that waits for the device anyway.
    """
    if accelerator.num_processes == 1:
        return interrupted.is_set()
    if done % REPORT_EVERY:
        return False
    own = torch.tensor([float(interrupted.is_set()), float(interrupted.terminated)], device=accelerator.device)
    pressed, terminated = accelerator.reduce(own, "sum").tolist()
    interrupted.terminated = terminated > 0
    return pressed > 0


def _write_output(plan: RunPlan, base: Base, trained: TrainedLora, progress: Progress) -> None:
    output = Path(plan.config.output.path)
    stated = write_run_file(
        output,
        plan,
        base,
        trained.weights,
        step=trained.step,
        tokens=trained.caption_tokens,
        started_at=trained.started_at,
        validation_loss=trained.validation_loss,
        identity_key=RUN_KEY,
        progress=progress,
    )
    if stated:
        forget_run(output)
    else:
        record_run(output, plan.identity)


def _check_skipped(session: TrainingSession, done: int) -> None:
    """Steps that only lowered the loss scale count where the run ends without any other."""
    skipped, settling = session.optimizer.skipped_steps(), session.optimizer.settling_steps()
    nothing_learned = skipped == done == session.plan.steps
    if nothing_learned or skipped - settling > MAX_SKIPPED_SHARE * done:
        raise TrainingError(
            f"{skipped} of {done} steps produced gradients with NaN or Inf and were skipped; lower "
            "optimizer.learning_rate, or set train.precision to float32"
        )
