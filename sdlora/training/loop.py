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
from ..errors import CompatibilityError, LoraFileError, TargetError, TrainingError
from ..families import WORDS_IN_CHUNK
from ..lora.change import Change
from ..progress import Progress
from .checkpoint import RUN_KEY, Checkpoint, RunFolder, finished, forget_run, record_run
from .course import own_losses, run_warning, tail_length
from .exports import write_run_file
from .file_check import FileCheck, check_file
from .fitted_steps import fitted
from .plan import RunPlan
from .processes import check_agreement, wait_for_all
from .records import StepRecord
from .report import TrainReport, TrainResult, complete_already
from .sample_sheet import draw_samples, lacks_samples
from .samples import check_samples
from .saving import RunFiles
from .session import open_session
from .shortage import CLOSE_OTHERS, explained
from .steps import train_steps
from .tracker import check_tracker
from .validation import validation_loss
from .validation_course import check_validation
from .validation_record import ValidationRecord

SETTINGS, COMPLETE = "settings, images, base, device or precision", "whether the output is complete"
NEWEST = "the newest checkpoint"
"""What every process of a run must see alike."""


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
        ProcessLostError: another process of the run has ended. The first one has saved the state.
        ConfigError: the processes of the run see other settings, images or checkpoints than the first.
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
    complete = not restart and finished(output, plan.identity)
    if restart and accelerator.is_main_process:
        files.remove()
    wait_for_all(accelerator)
    facts_seen = {SETTINGS: plan.identity.to_json(), COMPLETE: str(complete)}
    if complete:
        check_agreement(facts_seen, accelerator)
        result = complete_already(plan, folder)
        wanted = accelerator.is_main_process and lacks_samples(plan)
        drawn = draw_samples(plan, loaded, progress=progress, stop=stop) if wanted else None
        return TrainReport(result=result, samples=drawn)
    start = folder.newest(allow_device_change=allow_device_change) or Checkpoint.none(began)
    check_agreement({**facts_seen, NEWEST: str(start.step)}, accelerator)
    files.open(start)
    say(describe_precision(facts, chosen))
    if start.step and start.processes != accelerator.num_processes:
        start = replace(start, shape=None)  # A process has another share of the batch now.
        say(
            f"resuming with train.batch_size shared among {accelerator.num_processes}, earlier among {start.processes} "
            "processes: the images and the noise are the same, and the result is equal up to rounding"
        )
    with explained("loading the base", CLOSE_OTHERS):
        # Its parts are in main memory until they work, and its VAE encodes in float32.
        base = loaded(vae_dtype=torch.float32, home=torch.device("cpu"))
    trained = train_lora(plan, base, accelerator, files, start, progress, stop, say)
    check = None
    if accelerator.is_main_process:
        check = _written_and_checked(plan, base, trained, folder, progress)
        folder.close(plan.steps, keep=config.train.keep_state)
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
        session.adapter.restore_fixed(start.tensors)
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
