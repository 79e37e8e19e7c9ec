"""A loaded run: pictures in memory, layers in place, and the gradients of a step."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..base.encode import encode_pixels, encode_tokens, token_overflow, tokenize
from ..base.load import Base
from ..config import Config
from ..data.batches import draw
from ..data.images import open_picture, place
from ..data.items import Item
from ..lora.adapter import Adapter, choose_targets
from ..progress import Progress
from .loss import denoising_loss
from .optim import GuardedAdamW
from .plan import RunPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedPicture:
    """A picture as the UNet needs it. ``mean`` and ``std`` are (4, h, w) float32; ``ids`` (77,) int64."""

    mean: Tensor
    std: Tensor
    ids: Tensor


class Contexts:
    """Text conditioning of pictures: computed in each step where the text encoder is trained, else once."""

    def __init__(self, base: Base, config: Config, pictures: Sequence[CachedPicture]):
        self._base = base
        self._ids = [picture.ids for picture in pictures]
        self._empty = tokenize(base, [""])[0]
        self._frozen: dict[int | None, Tensor] | None = None
        if config.train.text_encoder_learning_rate == 0:
            with torch.no_grad():
                rows = {None: self._empty, **dict(enumerate(self._ids))}
                self._frozen = {number: encode_tokens(base, ids[None])[0] for number, ids in rows.items()}

    def of(self, numbers: Sequence[int | None]) -> Tensor:
        """(b, tokens, width) of the captions of pictures ``numbers``; None is the empty caption."""
        if self._frozen is not None:
            return torch.stack([self._frozen[number] for number in numbers])
        ids = torch.stack([self._empty if number is None else self._ids[number] for number in numbers])
        return encode_tokens(self._base, ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSession:
    """What every step of a run needs."""

    plan: RunPlan
    base: Base
    pictures: Sequence[CachedPicture]
    contexts: Contexts
    adapter: Adapter
    optimizer: GuardedAdamW
    accelerator: Accelerator

    @contextmanager
    def attached(self) -> Generator[None]:
        """Within the block, the trainable layers are in the base."""
        modules = self.base.modules()
        self.adapter.attach(modules)
        try:
            yield
        finally:
            self.adapter.detach(modules)

    def step(self, step: int) -> Tensor:
        """Do step ``step`` (from 0); returns this process's share of its mean loss, on the device."""
        self.adapter.begin_step()
        loss = self._backward(step)
        self.adapter.end_backward()
        self.optimizer.step(step, self.accelerator)
        return loss

    def _backward(self, step: int) -> Tensor:
        train, numbers = self.plan.config.train, self.plan.batches.batch(step)
        slots = range(self.accelerator.process_index, len(numbers), self.accelerator.num_processes)
        if not slots:
            return torch.zeros((), device=self.base.device)
        chosen = [self.pictures[numbers[slot]] for slot in slots]
        draws = [
            draw(
                seed=train.seed,
                step=step,
                slot=slot,
                slots=len(numbers),
                shape=tuple(chosen[0].mean.shape),
                timesteps=len(self.base.schedule.alphas_cumprod),
                caption_dropout=train.caption_dropout,
            )
            for slot in slots
        ]
        mean, std = torch.stack([p.mean for p in chosen]), torch.stack([p.std for p in chosen])
        latents = mean + std * self._on_device([d.posterior for d in draws])
        noise = self._on_device([d.noise for d in draws])
        timesteps = torch.tensor([d.timestep for d in draws], device=self.base.device)
        captions = [None if d.drop_caption else numbers[slot] for d, slot in zip(draws, slots, strict=True)]
        losses = denoising_loss(
            self.base, latents, noise, timesteps, self.contexts.of(captions), min_snr_gamma=train.min_snr_gamma
        )
        loss = losses.sum() / len(numbers)
        loss.backward()
        return loss.detach()

    def _on_device(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.base.device, non_blocking=True)


def open_session(plan: RunPlan, base: Base, accelerator: Accelerator, progress: Progress) -> TrainingSession:
    """Encode the pictures and make a fresh adapter and optimizer for ``plan`` on the loaded ``base``."""
    _warn_of_overflow(base, plan.items)
    pictures = _cache_pictures(base, plan, progress)
    adapter, rates = _new_adapter(base, plan.config)
    return TrainingSession(
        plan=plan,
        base=base,
        pictures=pictures,
        contexts=Contexts(base, plan.config, pictures),
        adapter=adapter,
        optimizer=GuardedAdamW(adapter.parameters, rates, plan.config.train),
        accelerator=accelerator,
    )


def _new_adapter(base: Base, config: Config) -> tuple[Adapter, list[float]]:
    """A fresh adapter on the parts that are trained, and the learning rate of each of its parameters."""
    targets = choose_targets(base.modules(), config.lora.targets)
    parts = {"unet.": config.train.learning_rate, "text_encoder.": config.train.text_encoder_learning_rate}
    groups = [({n: m for n, m in targets.items() if n.startswith(part)}, rate) for part, rate in parts.items() if rate]
    adapter = Adapter(
        [group for group, _ in groups], rank=config.lora.rank, alpha=config.lora.alpha, seed=config.train.seed
    )
    return adapter, [rate for _, rate in groups]


def _cache_pictures(base: Base, plan: RunPlan, progress: Progress) -> list[CachedPicture]:
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
