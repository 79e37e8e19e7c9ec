"""A training run, from a plan to a LoRA file and its samples, top to bottom."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

from ..base.base import Base
from ..base.device_memory import cast, move_to
from ..base.load import decoding_dtype, load_base
from ..base.precision import choose_precision
from ..errors import Interrupted, TargetError, TrainingError
from ..families import WORDS_IN_CHUNK
from ..formats.lora_writer import write_lora
from ..lora.low_rank import LowRank
from ..progress import Progress
from .checkpoint import RUN_KEY, Checkpoint, RunFolder, finished, forget_run, record_run
from .course import loss_warning, tail_length
from .facts import describe_run
from .plan import RunPlan
from .samples import write_missing_samples, write_samples
from .session import TrainingSession, open_session
from .texts import changed_metadata, write_texts
from .validation import validation_loss

REPORT_EVERY = 10
"""Steps between readings of the loss: each reading waits for the device."""
MAX_SKIPPED_SHARE = 0.5
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    output: Path
    steps: int
    seconds: float
    """Time that this call spent on loading, encoding and training."""
    loss: float | None
    """Mean over the last 10 % of the steps; None where this call did no step."""
    validation_loss: float | None
    """Mean over the validation images after the last step; None without such images, or where the run was complete."""
    resumed_from: int
    """Steps that an earlier, interrupted call had done."""
    warning: str | None = None
    """What the losses say against the run, and the likely cause; None where nothing is known against it."""
    texts_written: bool = False
    """Whether the run was complete already, and new texts of ``[output]`` were written into its file."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What ``train`` made: the run's result, and the sample sheet, or None where none was made."""

    result: TrainResult
    samples: Path | None


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedLora:
    """The outcome of the steps. ``weights`` are float32 on the CPU, by canonical module name."""

    weights: Mapping[str, LowRank]
    caption_tokens: int
    """Tokens of a caption that were read, at most."""
    started_at: float
    """Seconds since 1970 when the first of all calls started."""
    resumed_from: int
    loss: float | None
    warning: str | None
    validation_loss: float | None


def run_training(
    plan: RunPlan,
    *,
    restart: bool,
    progress: Progress,
    stop: threading.Event | None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainReport:
    """Train as planned, resuming from the newest checkpoint, and write the LoRA file and its samples.

    Raises:
        ResumeError: output or checkpoints of another run are in the way.
        TrainingError: half of the steps produced gradients with NaN or Inf.
        TargetError: the file cannot be written; the message names the checkpoint that has the weights.
        Interrupted: Ctrl-C, SIGTERM or ``stop``; the state is saved.
    """
    began, config = time.time(), plan.config
    output = Path(config.output.path)
    accelerator, folder = Accelerator(), RunFolder(output, plan.identity)
    if restart:
        folder.remove()
    elif finished(output, plan.identity):
        result = _complete_already(plan, folder)
        drawn = accelerator.is_main_process and write_missing_samples(plan, progress=progress, stop=stop)
        return TrainReport(result=result, samples=drawn or None)
    start = folder.newest() or Checkpoint(step=0, started_at=began, tensors={})

    dtype = choose_precision(config.train.precision, accelerator.device, unet_parameters=plan.base.unet_parameters)
    # Parts are in main memory until they work. The VAE encodes in float32, once.
    main_memory = torch.device("cpu")
    base = load_base(plan.base, device=accelerator.device, dtype=dtype, vae_dtype=torch.float32, home=main_memory)
    trained = train_lora(plan, base, accelerator, folder, start, progress, stop)
    if accelerator.is_main_process:
        try:
            _write_output(plan, base, trained, progress)
        except OSError as error:
            raise TargetError(
                f"{output}: cannot be written ({error.strerror or error}); the newest checkpoint is kept: "
                f"{folder.place()}; make space, then run the same command to resume from it"
            ) from None
        folder.remove()
    accelerator.wait_for_everyone()
    result = TrainResult(
        output=output,
        steps=config.train.steps,
        seconds=time.time() - began,
        loss=trained.loss,
        validation_loss=trained.validation_loss,
        resumed_from=trained.resumed_from,
        warning=trained.warning,
    )
    if not accelerator.is_main_process:
        return TrainReport(result=result, samples=None)
    cast(decoding_dtype(dtype, base.device), base.vae)
    move_to(base.device, base.unet, base.vae, *base.encoder_models())
    return TrainReport(result=result, samples=write_samples(base, plan, output, progress=progress, stop=stop))


def train_lora(
    plan: RunPlan,
    base: Base,
    accelerator: Accelerator,
    folder: RunFolder,
    start: Checkpoint,
    progress: Progress,
    stop: threading.Event | None,
) -> TrainedLora:
    """Do every step after ``start``, and the validation. ``base`` is unchanged on return.

    Images, embeddings and optimizer are released on return, before samples need the memory.
    """
    session = open_session(plan, base, accelerator, progress, first=start.step)
    if start.step:
        session.optimizer.restore(start.tensors)
    try:
        with session.attached():
            losses = train_steps(session, start, folder, progress, stop)
            held_out = validation_loss(session, progress)
    finally:
        session.embeddings.close()
    steps = plan.config.train.steps
    return TrainedLora(
        weights=session.adapter.weights(),
        caption_tokens=WORDS_IN_CHUNK * session.embeddings.chunks,
        started_at=start.started_at,
        resumed_from=start.step,
        loss=losses[-tail_length(steps) :].mean().item() if len(losses) else None,
        warning=loss_warning(losses.tolist(), first=start.step, steps=steps, unlearned=_unlearned_loss(session)),
        validation_loss=held_out,
    )


def train_steps(
    session: TrainingSession,
    start: Checkpoint,
    folder: RunFolder,
    progress: Progress,
    stop: threading.Event | None = None,
) -> torch.Tensor:
    """Do every step after ``start``; returns the loss of each, (steps done here,) float32 on the device.

    The state after the last step is saved too, so nothing is lost if the file cannot be written. A checkpoint that cannot
    be written is a warning.
    """
    train, first = session.plan.config.train, start.step
    steps = train.steps
    losses = torch.zeros(steps - first, device=session.base.device)
    progress.start("Training", steps, first)
    reported = first

    def save(done: int) -> str:
        """What to say of the step when stopping there."""
        if session.accelerator.is_main_process:
            try:
                folder.save(Checkpoint(step=done, started_at=start.started_at, tensors=session.optimizer.state()))
            except OSError as error:
                failed = f"step {done} cannot be saved ({error.strerror or error}); kept: {folder.place()}"
                logger.warning("%s", failed)
                return f", but {failed}"
        return ""

    with interrupt_flag(stop) as interrupted:
        for step in range(first, steps):
            loss, done = session.step(step), step + 1
            losses[step - first] = loss
            if done % REPORT_EVERY == 0 or done == steps:
                progress.advance(done - reported, f"loss {losses[reported - first : done - first].mean().item():.4f}")
                reported = done
            if done % train.save_every == 0 and done < steps:
                _check_skipped(session, done)
                save(done)
            if done < steps and _all_stop(session.accelerator, interrupted, done):
                unsaved = save(done)
                session.accelerator.wait_for_everyone()
                text = f"stopped after step {done} of {steps}{unsaved}; run the same command to resume"
                raise Interrupted(text, terminated=interrupted.terminated)
    _check_skipped(session, steps)
    if first < steps:
        save(steps)
    return losses


def _unlearned_loss(session: TrainingSession) -> float:
    """Mean loss of a model that always predicts zero, at most: what it should predict has a variance of about 1."""
    schedule, gamma = session.base.schedule, session.plan.config.objective.min_snr_gamma
    timesteps = torch.arange(len(schedule.alphas_cumprod), device=session.base.device)
    weights = session.plan.training.weights
    return schedule.min_snr_weight(timesteps, gamma).mean().item() * max(1.0, *weights)


def _complete_already(plan: RunPlan, folder: RunFolder) -> TrainResult:
    """The result of a run whose file exists; new texts are written into it."""
    output, processes = Path(plan.config.output.path), PartialState()
    metadata = changed_metadata(output, plan.config)
    # Every process has read the file before one changes it.
    processes.wait_for_everyone()
    if processes.is_main_process:
        folder.remove()
        if metadata is not None:
            write_texts(output, metadata, plan.identity)
    return TrainResult(
        output=output,
        steps=plan.config.train.steps,
        seconds=0.0,
        loss=None,
        validation_loss=None,
        resumed_from=0,
        texts_written=metadata is not None,
    )


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


class InterruptFlag:
    """Set by Ctrl-C, by SIGTERM, or by the caller's event, which these leave alone."""

    terminated = False
    """Whether SIGTERM set it, in any process once they have compared."""

    def __init__(self, stop: threading.Event | None):
        self._pressed, self._stop = threading.Event(), stop

    def set(self, number: int = signal.SIGINT) -> None:
        self.terminated |= number == signal.SIGTERM
        self._pressed.set()

    def is_set(self) -> bool:
        return self._pressed.is_set() or (self._stop is not None and self._stop.is_set())


@contextmanager
def interrupt_flag(stop: threading.Event | None = None) -> Generator[InterruptFlag]:
    """A flag that ``stop`` sets and, in the main thread, the first Ctrl-C or SIGTERM; a second ends at once."""
    flag = InterruptFlag(stop)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_interrupt(number: int, _: object) -> None:
        flag.set(number)
        signal.signal(number, signal.SIG_DFL)

    for number in previous:
        signal.signal(number, on_interrupt)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _write_output(plan: RunPlan, base: Base, trained: TrainedLora, progress: Progress) -> None:
    output, level = Path(plan.config.output.path), plan.config.output.metadata
    metadata = describe_run(
        plan,
        base,
        modules=len(trained.weights),
        tokens=trained.caption_tokens,
        started_at=trained.started_at,
        validation_loss=trained.validation_loss,
        progress=progress,
    )
    if level == "full":
        metadata[RUN_KEY] = plan.identity.to_json()
    write_lora(
        output,
        trained.weights,
        None if level == "none" else metadata,
        dtype=getattr(torch, plan.config.output.precision),
        family=plan.base.family,
        base_modules=plan.base.module_shapes(),
    )
    if level == "full":
        forget_run(output)
    else:
        record_run(output, plan.identity)


def _check_skipped(session: TrainingSession, done: int) -> None:
    skipped = session.optimizer.skipped_steps()
    if skipped > MAX_SKIPPED_SHARE * done:
        raise TrainingError(
            f"{skipped} of {done} steps produced gradients with NaN or Inf and were skipped; lower "
            "optimizer.learning_rate, or set train.precision to float32"
        )
