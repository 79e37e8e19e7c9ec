"""A training run, from a configuration to a LoRA file, top to bottom."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..base.encode import encode_pixels, encode_tokens, token_overflow, tokenize
from ..base.load import Base, BaseFolder, find_base, load_base
from ..config import Config
from ..data.batches import BatchPlan, draw
from ..data.buckets import Placement, bucket_sizes, place_in_bucket
from ..data.images import open_picture, place
from ..data.items import Item, dataset_digest, scan
from ..errors import ConfigError, Interrupted, TrainingError
from ..formats.lora_file import write_kohya
from ..formats.metadata import DatasetFacts, RunFacts, safe_title, training_metadata
from ..lora.adapter import Adapter, choose_targets
from ..precision import choose_precision
from ..progress import Progress
from .checkpoint import RUN_KEY, Checkpoint, RunFolder, RunIdentity, finished
from .loss import denoising_loss
from .optim import GuardedAdamW

logger = logging.getLogger(__name__)

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
    resumed_from: int
    """Steps that an earlier, interrupted call had done."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that is decided before a model is loaded."""

    config: Config
    base: BaseFolder
    items: tuple[Item, ...]
    placements: tuple[Placement, ...]
    batches: BatchPlan
    identity: RunIdentity


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedPicture:
    """A picture as the UNet needs it. ``mean`` and ``std`` are (4, h, w) float32; ``ids`` (77,) int64."""

    mean: Tensor
    std: Tensor
    ids: Tensor


def plan_run(config: Config) -> RunPlan:
    """Check the base, the pictures and the captions, and place every picture.

    Raises:
        BaseModelError, DataError, ConfigError: with everything that is wrong with that input.
    """
    base = find_base(config.base.path)
    if config.train.learning_rate == 0 and config.train.text_encoder_learning_rate == 0:
        raise ConfigError(
            "train.learning_rate and train.text_encoder_learning_rate are both 0: nothing would be trained"
        )
    data = config.data
    items = scan(
        Path(data.images),
        trigger=data.trigger,
        caption_extension=data.caption_extension,
        background=data.alpha_background,
    )
    resolution = data.resolution or base.resolution
    sizes = bucket_sizes(resolution, base.size_step)
    placements = tuple(place_in_bucket(item.width, item.height, sizes) for item in items)
    return RunPlan(
        config=config,
        base=base,
        items=tuple(items),
        placements=placements,
        batches=BatchPlan.of(placements, batch_size=config.train.batch_size, seed=config.train.seed),
        identity=RunIdentity.of(config, dataset=dataset_digest(items), base=base),
    )


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
        return TrainResult(output=output, steps=config.train.steps, seconds=0.0, loss=None, resumed_from=0)
    checkpoint = folder.newest()

    accelerator = Accelerator()
    dtype = choose_precision(config.train.precision, accelerator.device)
    base = load_base(plan.base, device=accelerator.device, dtype=dtype)
    _warn_of_overflow(base, plan.items)
    pictures = cache_pictures(base, plan, progress)
    modules = base.modules()
    adapter, rates = new_adapter(base, config)
    optimizer = GuardedAdamW(adapter.parameters, rates, config.train)
    first, started_at = 0, began
    if checkpoint is not None:
        optimizer.restore(dict(checkpoint.tensors))
        first, started_at = checkpoint.step, checkpoint.started_at

    adapter.attach(modules)
    try:
        losses = train_steps(base, plan, pictures, adapter, optimizer, first, started_at, folder, accelerator, progress)
    finally:
        adapter.detach(modules)

    if accelerator.is_main_process:
        weights = adapter.weights()
        metadata = describe_run(plan, base, modules=len(weights), started_at=started_at)
        metadata[RUN_KEY] = plan.identity.to_json()
        file_dtype = getattr(torch, config.output.precision)
        write_kohya(output, weights, metadata, dtype=file_dtype, family=plan.base.family)
        folder.remove()
    accelerator.wait_for_everyone()
    return TrainResult(
        output=output,
        steps=config.train.steps,
        seconds=time.time() - began,
        loss=losses,
        resumed_from=first,
    )


def new_adapter(base: Base, config: Config) -> tuple[Adapter, list[float]]:
    """A fresh adapter on the parts that are trained, and the learning rate of each of its parameters."""
    targets = choose_targets(base.modules(), config.lora.targets)
    parts = {"unet.": config.train.learning_rate, "text_encoder.": config.train.text_encoder_learning_rate}
    groups = [({n: m for n, m in targets.items() if n.startswith(part)}, rate) for part, rate in parts.items() if rate]
    adapter = Adapter(
        [group for group, _ in groups], rank=config.lora.rank, alpha=config.lora.alpha, seed=config.train.seed
    )
    return adapter, [rate for _, rate in groups]


def cache_pictures(base: Base, plan: RunPlan, progress: Progress) -> list[CachedPicture]:
    """Encode every picture once, to stay on the device."""
    progress.start("Encoding pictures", len(plan.items))
    cached = []
    for item, placement in zip(plan.items, plan.placements, strict=True):
        picture = open_picture(item.file, plan.config.data.alpha_background)
        posterior = encode_pixels(base, place(picture, placement)[None])
        ids = tokenize(base, [item.caption])[0]
        cached.append(CachedPicture(mean=posterior.mean[0], std=posterior.std[0], ids=ids))
        progress.advance()
    return cached


def train_steps(
    base: Base,
    plan: RunPlan,
    pictures: Sequence[CachedPicture],
    adapter: Adapter,
    optimizer: GuardedAdamW,
    first: int,
    started_at: float,
    folder: RunFolder,
    accelerator: Accelerator,
    progress: Progress,
) -> float:
    """Steps ``first`` to the last; returns the mean loss of the last tenth (of those done here)."""
    train = plan.config.train
    steps, tail = train.steps, max(1, train.steps // 10)
    contexts = Contexts(base, plan, pictures)
    recent = torch.zeros((), device=base.device)
    tail_loss, tail_steps = torch.zeros((), device=base.device), 0
    progress.start("Training", steps, first)

    def save(step: int) -> None:
        if accelerator.is_main_process:
            folder.save(Checkpoint(step=step, started_at=started_at, tensors=optimizer.state()))

    with interrupt_flag() as interrupted:
        for step in range(first, steps):
            adapter.begin_step()
            loss = step_gradients(base, plan, pictures, contexts, step, accelerator)
            adapter.end_backward()
            optimizer.step(step, accelerator)
            recent += loss
            if step >= steps - tail:
                tail_loss, tail_steps = tail_loss + loss, tail_steps + 1
            done = step + 1
            if done % REPORT_EVERY == 0:
                progress.advance(REPORT_EVERY, f"loss {recent.item() / REPORT_EVERY:.4f}")
                recent.zero_()
            if done % train.save_every == 0 and done < steps:
                _check_skipped(optimizer, done)
                save(done)
            if interrupted.is_set() and done < steps:
                save(done)
                raise Interrupted(f"stopped after step {done} of {steps}; the same command goes on from there")
    _check_skipped(optimizer, steps)
    return tail_loss.item() / max(1, tail_steps)


def step_gradients(
    base: Base,
    plan: RunPlan,
    pictures: Sequence[CachedPicture],
    contexts: Contexts,
    step: int,
    accelerator: Accelerator,
) -> Tensor:
    """Add the gradients of this process's share of the batch of ``step``; returns its share of the mean loss."""
    train, numbers = plan.config.train, plan.batches.batch(step)
    slots = range(accelerator.process_index, len(numbers), accelerator.num_processes)
    if not slots:
        return torch.zeros((), device=base.device)
    chosen = [pictures[numbers[slot]] for slot in slots]
    draws = [
        draw(
            seed=train.seed,
            step=step,
            slot=slot,
            slots=len(numbers),
            shape=tuple(pictures[numbers[0]].mean.shape),
            timesteps=len(base.schedule.alphas_cumprod),
            caption_dropout=train.caption_dropout,
        )
        for slot in slots
    ]

    def stacked(arrays) -> Tensor:
        return torch.stack([torch.from_numpy(array) for array in arrays]).to(base.device, non_blocking=True)

    mean, std = torch.stack([p.mean for p in chosen]), torch.stack([p.std for p in chosen])
    latents = mean + std * stacked(d.posterior for d in draws)
    timesteps = torch.tensor([d.timestep for d in draws], device=base.device)
    context = contexts.of([None if d.drop_caption else numbers[slot] for d, slot in zip(draws, slots, strict=True)])
    losses = denoising_loss(
        base, latents, stacked(d.noise for d in draws), timesteps, context, min_snr_gamma=train.min_snr_gamma
    )
    loss = losses.sum() / len(numbers)
    loss.backward()
    return loss.detach()


class Contexts:
    """Text conditioning of pictures: computed in each step where the text encoder is trained, else once."""

    def __init__(self, base: Base, plan: RunPlan, pictures: Sequence[CachedPicture]):
        self._base = base
        self._ids = [picture.ids for picture in pictures]
        self._empty = tokenize(base, [""])[0]
        self._frozen: dict[int | None, Tensor] | None = None
        if plan.config.train.text_encoder_learning_rate == 0:
            with torch.no_grad():
                rows = {None: self._empty, **dict(enumerate(self._ids))}
                self._frozen = {number: encode_tokens(base, ids[None])[0] for number, ids in rows.items()}

    def of(self, numbers: Sequence[int | None]) -> Tensor:
        """(b, tokens, width) of the captions of pictures ``numbers``; None is the empty caption."""
        if self._frozen is not None:
            return torch.stack([self._frozen[number] for number in numbers])
        ids = torch.stack([self._empty if number is None else self._ids[number] for number in numbers])
        return encode_tokens(self._base, ids)


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


def describe_run(plan: RunPlan, base: Base, *, modules: int, started_at: float) -> dict[str, str]:
    """The metadata of the finished file."""
    sizes = [(placement.width, placement.height) for placement in plan.placements]
    run = RunFacts(
        title=safe_title(Path(plan.config.output.path).stem),
        base_name=plan.base.name,
        family=plan.base.family,
        prediction=base.schedule.prediction,
        resolution=plan.config.data.resolution or plan.base.resolution,
        modules=modules,
        epochs=-(-plan.config.train.steps // plan.batches.batches_per_epoch),
        batches_per_epoch=plan.batches.batches_per_epoch,
        precision=str(base.dtype).removeprefix("torch."),
        session=int(plan.identity.dataset[:8], 16) ^ plan.config.train.seed,
        started_at=started_at,
        finished_at=time.time(),
    )
    data = DatasetFacts(
        folder=Path(plan.config.data.images).resolve().name,
        captions=[item.caption for item in plan.items],
        buckets={size: sizes.count(size) for size in sizes},
    )
    return training_metadata(plan.config, run, data)


def _check_skipped(optimizer: GuardedAdamW, done: int) -> None:
    skipped = int(optimizer.skipped.item())
    if skipped > MAX_SKIPPED_SHARE * done:
        raise TrainingError(
            f"{skipped} of {done} steps gave no finite gradient and were left out; lower train.learning_rate, "
            "or set train.precision to float32"
        )


def _warn_of_overflow(base: Base, items: Sequence[Item]) -> None:
    limit = base.tokenizer.model_max_length - 2
    for item in items:
        if overflow := token_overflow(base, item.caption):
            logger.warning(
                "%s: the last %d tokens of its caption are not read (the text encoder reads %d)",
                item.file,
                overflow,
                limit,
            )
