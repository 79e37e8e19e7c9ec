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

from ..base.encode import Conditioning, Framing, encode_pixels, encode_prompts
from ..base.load import Base
from ..base.tokens import PromptTokens, padded, plain, token_count, tokenize
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
    """A picture as the UNet needs it. ``mean`` and ``std`` are (4, h, w) float32."""

    mean: Tensor
    std: Tensor
    framing: Framing


class Contexts:
    """Text conditioning of captions: computed in each step where the text encoders are trained, else once.

    All captions get the chunks of the longest, so that what one is told does not hang on its neighbours in a batch.
    """

    def __init__(self, base: Base, config: Config, captions: Sequence[str]):
        self._base = base
        rows = [tokenize(base, plain(text), limit=config.data.max_token_length) for text in ("", *captions)]
        self.chunks = max(own.chunks for row in rows for own in row)
        self._tokens: list[PromptTokens] = [padded(base, row, self.chunks) for row in rows]
        self._frozen: list[Conditioning] | None = None
        if config.train.text_encoder_learning_rate == 0:
            with torch.no_grad():
                self._frozen = [encode_prompts(base, [row]) for row in self._tokens]

    def of(self, numbers: Sequence[int | None]) -> Conditioning:
        """Of the captions of pictures ``numbers``; None is the empty caption."""
        rows = [0 if number is None else number + 1 for number in numbers]
        if self._frozen is not None:
            return Conditioning.stack([self._frozen[row] for row in rows])
        return encode_prompts(self._base, [self._tokens[row] for row in rows])


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
            self.base,
            latents,
            noise,
            timesteps,
            self.contexts.of(captions),
            [picture.framing for picture in chosen],
            min_snr_gamma=train.min_snr_gamma,
        )
        loss = losses.sum() / len(numbers)
        loss.backward()
        return loss.detach()

    def _on_device(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.base.device, non_blocking=True)


def open_session(plan: RunPlan, base: Base, accelerator: Accelerator, progress: Progress) -> TrainingSession:
    """Encode the pictures and make a fresh adapter and optimizer for ``plan`` on the loaded ``base``."""
    _warn_of_overflow(base, plan.items, plan.config.data.max_token_length)
    pictures = _cache_pictures(base, plan, progress)
    adapter, rates = _new_adapter(base, plan.config)
    if plan.config.train.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    return TrainingSession(
        plan=plan,
        base=base,
        pictures=pictures,
        contexts=Contexts(base, plan.config, [item.caption for item in plan.items]),
        adapter=adapter,
        optimizer=GuardedAdamW(adapter.parameters, rates, plan.config.train),
        accelerator=accelerator,
    )


def _new_adapter(base: Base, config: Config) -> tuple[Adapter, list[float]]:
    """A fresh adapter on the parts that are trained, and the learning rate of each of its parameters."""
    targets = choose_targets(base.modules(), config.lora.targets)
    parts = {"unet": config.train.learning_rate}
    parts |= {encoder.facts.part: config.train.text_encoder_learning_rate for encoder in base.text_encoders}
    groups = [
        ({n: m for n, m in targets.items() if n.startswith(f"{part}.")}, rate) for part, rate in parts.items() if rate
    ]
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
        framing = Framing(
            original_width=item.width,
            original_height=item.height,
            left=placement.left,
            top=placement.top,
            width=placement.width,
            height=placement.height,
        )
        cached.append(CachedPicture(mean=posterior.mean[0], std=posterior.std[0], framing=framing))
        progress.advance()
    return cached


def _warn_of_overflow(base: Base, items: Sequence[Item], limit: int) -> None:
    for item in items:
        if (overflow := token_count(base, item.caption) - limit) > 0:
            logger.warning(
                "%s: the last %d tokens of its caption are not read (data.max_token_length is %d)",
                item.file,
                overflow,
                limit,
            )
