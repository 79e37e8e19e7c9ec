"""A training run, from a configuration to a LoRA file, top to bottom."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ..base.base import Base
from ..base.load import load_base
from ..base.precision import choose_precision
from ..errors import Interrupted, TrainingError
from ..families import WORDS_IN_CHUNK
from ..formats.hashes import FileHashes, file_hashes
from ..formats.lora_writer import write_lora
from ..formats.metadata import safe_title
from ..progress import Progress
from .checkpoint import RUN_KEY, Checkpoint, RunFolder, finished, forget_run, record_run
from .facts import describe_data
from .metadata import RunFacts, training_metadata
from .plan import RunPlan
from .session import TrainingSession, open_session
from .validation import validation_loss

REPORT_EVERY = 10
"""Steps between readings of the loss: each reading waits for the device."""
MAX_SKIPPED_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    output: Path
    steps: int
    seconds: float
    """Spent in this call on loading, caching and training."""
    loss: float | None
    """Mean of the last tenth of the steps; None where nothing was left to do."""
    validation_loss: float | None
    """Mean over the validation images after the last step; None where there are none, or nothing was left to do."""
    resumed_from: int
    """Steps that an earlier, interrupted call had done."""


def run_training(plan: RunPlan, *, restart: bool, progress: Progress) -> TrainResult:
    """Train as planned, going on from the newest checkpoint, and write the LoRA file.

    Raises:
        ResumeError: output or checkpoints of another run are in the way.
        TrainingError: half of the steps gave no finite gradient.
        Interrupted: Ctrl-C; the state is saved.
    """
    began, config = time.time(), plan.config
    output = Path(config.output.path)
    folder = RunFolder(output, plan.identity)
    if restart:
        folder.remove()
    elif finished(output, plan.identity):
        folder.remove()
        return TrainResult(
            output=output, steps=config.train.steps, seconds=0.0, loss=None, validation_loss=None, resumed_from=0
        )
    checkpoint = folder.newest()

    accelerator = Accelerator()
    dtype = choose_precision(config.train.precision, accelerator.device, unet_parameters=plan.base.unet_parameters)
    base = load_base(plan.base, device=accelerator.device, dtype=dtype)
    session = open_session(plan, base, accelerator, progress)
    first, started_at = 0, began
    if checkpoint is not None:
        session.optimizer.restore(dict(checkpoint.tensors))
        first, started_at = checkpoint.step, checkpoint.started_at
    with session.attached():
        loss = train_steps(session, first, started_at, folder, progress)
        held_out = validation_loss(session, progress)
    session.embeddings.close()

    if accelerator.is_main_process:
        weights = session.adapter.weights()
        tokens = WORDS_IN_CHUNK * session.embeddings.chunks
        metadata = describe_run(
            plan,
            base,
            modules=len(weights),
            tokens=tokens,
            started_at=started_at,
            validation_loss=held_out,
            progress=progress,
        )
        level = config.output.metadata
        if level == "full":
            metadata[RUN_KEY] = plan.identity.to_json()
        write_lora(
            output,
            weights,
            None if level == "none" else metadata,
            dtype=getattr(torch, config.output.precision),
            family=plan.base.family,
            base_modules=plan.base.module_shapes(),
        )
        if level == "full":
            forget_run(output)
        else:
            record_run(output, plan.identity)
        folder.remove()
    accelerator.wait_for_everyone()
    return TrainResult(
        output=output,
        steps=config.train.steps,
        seconds=time.time() - began,
        loss=loss,
        validation_loss=held_out,
        resumed_from=first,
    )


def train_steps(
    session: TrainingSession, first: int, started_at: float, folder: RunFolder, progress: Progress
) -> float:
    """Steps ``first`` to the last; returns the mean loss of the last tenth (of those done here)."""
    train = session.plan.config.train
    steps, tail = train.steps, max(1, train.steps // 10)
    recent, tail_loss = torch.zeros(2, device=session.base.device)
    progress.start("Training", steps, first)

    def save(done: int) -> None:
        if session.accelerator.is_main_process:
            folder.save(Checkpoint(step=done, started_at=started_at, tensors=session.optimizer.state()))

    with interrupt_flag() as interrupted:
        for step in range(first, steps):
            loss, done = session.step(step), step + 1
            recent += loss
            if done > steps - tail:
                tail_loss += loss
            if done % REPORT_EVERY == 0:
                progress.advance(REPORT_EVERY, f"loss {recent.item() / REPORT_EVERY:.4f}")
                recent.zero_()
            if done % train.save_every == 0 and done < steps:
                _check_skipped(session, done)
                save(done)
            if interrupted.is_set() and done < steps:
                save(done)
                raise Interrupted(f"stopped after step {done} of {steps}; the same command goes on from there")
    _check_skipped(session, steps)
    return tail_loss.item() / max(1, min(tail, steps - first))


@contextmanager
def interrupt_flag() -> Generator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one kills, as ever."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_: object) -> None:
        flag.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def describe_run(
    plan: RunPlan,
    base: Base,
    *,
    modules: int,
    tokens: int,
    started_at: float,
    validation_loss: float | None,
    progress: Progress,
) -> dict[str, str]:
    """The metadata of the finished file; captions were read up to ``tokens`` tokens."""
    own = plan.config.base
    run = RunFacts(
        title=safe_title(Path(plan.config.output.path).stem),
        base_name=Path(own.path).name,
        base_hashes=_hashes(own.path, progress),
        vae_name=own.vae and Path(own.vae).name,
        vae_hashes=_hashes(own.vae, progress),
        family=plan.base.family,
        prediction=base.schedule.prediction,
        resolution=plan.resolution,
        modules=modules,
        epochs=-(-plan.config.train.steps // plan.batches.batches_per_epoch),
        batches_per_epoch=plan.batches.batches_per_epoch,
        precision=str(base.dtype).removeprefix("torch."),
        clip_skip=plan.config.base.clip_skip,
        token_length=tokens,
        zero_terminal_snr=plan.base.schedule.zero_terminal_snr,
        session=int(plan.identity.dataset[:8], 16) ^ plan.config.train.seed,
        started_at=started_at,
        finished_at=time.time(),
    )
    return training_metadata(plan.config, run, describe_data(plan, validation_loss))


def _hashes(path: str | None, progress: Progress) -> FileHashes | None:
    """Of a checkpoint file; None of a folder."""
    return file_hashes(Path(path), progress) if path is not None and Path(path).is_file() else None


def _check_skipped(session: TrainingSession, done: int) -> None:
    skipped = session.optimizer.skipped_steps()
    if skipped > MAX_SKIPPED_SHARE * done:
        raise TrainingError(
            f"{skipped} of {done} steps gave no finite gradient and were left out; lower optimizer.learning_rate, "
            "or set train.precision to float32"
        )
