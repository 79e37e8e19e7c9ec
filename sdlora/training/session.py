"""A run in memory: encoded images, trainable layers, and the gradients of a step."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..base.base import Base
from ..base.device_memory import Room, move_to
from ..cache.store import open_cache
from ..config.sections import Config
from ..data.views import View
from ..lora.adapter import Adapter, choose_targets
from ..progress import Progress
from .batches import draw, share
from .caption_embeddings import CaptionEmbeddings, open_caption_embeddings
from .fit import StepShape, choose_shape
from .latents import EncodedImage, encode_views
from .loss import denoising_loss
from .optimizer import GuardedAdamW
from .plan import RunPlan

DEVICE_BYTES = 2**31
"""Bytes of latents and embeddings kept on the device; the others stay in main memory and are copied when they are needed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSession:
    """What every step of a run needs."""

    plan: RunPlan
    shape: StepShape
    base: Base
    images: Mapping[View, EncodedImage]
    embeddings: CaptionEmbeddings
    adapter: Adapter
    optimizer: GuardedAdamW
    accelerator: Accelerator

    @contextmanager
    def attached(self) -> Generator[None]:
        """Within the block, the layers are in the base, and the UNet checkpoints gradients if ``shape`` says so."""
        modules, checkpointing = self.base.modules(), self.shape.checkpointing
        self.adapter.attach(modules)
        if checkpointing:
            self.base.unet.enable_gradient_checkpointing()
        try:
            yield
        finally:
            if checkpointing:
                self.base.unet.disable_gradient_checkpointing()
            self.adapter.detach(modules)

    def step(self, step: int) -> Tensor:
        """Do step ``step`` (from 0); returns this process's share of its mean loss, () float32 on the device."""
        self.adapter.begin_step()
        loss = self._backward(step)
        self.adapter.end_backward()
        self.optimizer.step(step, self.accelerator)
        return loss

    def _backward(self, step: int) -> Tensor:
        train, samples = self.plan.config.train, self.plan.training.batch(step)
        processes = self.accelerator.num_processes
        slots = share(len(samples), process=self.accelerator.process_index, processes=processes)
        if not slots:
            return torch.zeros((), device=self.base.device)
        chosen = [self.images[samples[slot].view] for slot in slots]
        draws = [
            draw(
                seed=train.seed,
                step=step,
                slot=slot,
                slots=len(samples),
                shape=tuple(chosen[0].mean.shape),
                timesteps=len(self.base.schedule.alphas_cumprod),
                caption_dropout=self.plan.config.data.caption_dropout,
            )
            for slot in slots
        ]
        mean, std = self.stacked([image.mean for image in chosen]), self.stacked([image.std for image in chosen])
        latents = mean + std * self.on_device([drawn.posterior for drawn in draws])
        captions = [
            "" if drawn.drop_caption else samples[slot].caption for drawn, slot in zip(draws, slots, strict=True)
        ]
        losses = denoising_loss(
            self.base,
            latents,
            self.on_device([drawn.noise for drawn in draws]),
            torch.tensor([drawn.timestep for drawn in draws], device=self.base.device),
            self.embeddings.encode(captions),
            [image.framing for image in chosen],
            min_snr_gamma=self.plan.config.objective.min_snr_gamma,
            masks=self.masks(chosen),
        )
        weights = torch.tensor([samples[slot].weight for slot in slots], device=self.base.device)
        loss = (losses * weights).sum() / len(samples)
        loss.backward()
        return loss.detach()

    def masks(self, images: Sequence[EncodedImage]) -> Tensor | None:
        """Masks at latent size, (b, 1, h, w) float32, all ones for images without one; None if no image has a mask."""
        if all(image.mask is None for image in images):
            return None
        return self.stacked(
            [image.mean.new_ones(1, *image.mean.shape[1:]) if image.mask is None else image.mask for image in images]
        )

    def stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor, (b, ...), on the device."""
        return torch.stack([tensor.to(self.base.device, non_blocking=True) for tensor in tensors])

    def on_device(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """One tensor, (b, ...), on the device."""
        return torch.from_numpy(np.stack(arrays)).to(self.base.device, non_blocking=True)


def open_session(
    plan: RunPlan, base: Base, accelerator: Accelerator, progress: Progress, *, first: int = 0
) -> TrainingSession:
    """Encode the images and make a fresh adapter and optimizer for ``plan`` on the loaded ``base``.

    Parts of ``base`` that are in main memory come to its device one after another, each when it works: the VAE, the text
    encoders, which compute the captions of the steps from ``first`` on, and the UNet, which stays there.
    """
    config, training = plan.config, plan.training
    views = (*training.views(config.train.steps), *training.validation)
    cache = open_cache(config.cache)
    room = Room(base.device, DEVICE_BYTES)
    images = encode_views(base, training.items, views, config, cache, plan.kept, progress, room)
    plan.kept.clear()
    embeddings = open_caption_embeddings(
        base,
        training.items,
        config,
        cache,
        room=room,
        ahead=None if base.device.type == "cpu" else _captions(plan, first),
        progress=progress,
    )
    move_to(base.device, base.unet)
    adapter, rates = _new_adapter(base, config)
    return TrainingSession(
        plan=plan,
        shape=choose_shape(config.train),
        base=base,
        images=images,
        embeddings=embeddings,
        adapter=adapter,
        optimizer=GuardedAdamW(adapter.parameters, rates, config.optimizer, steps=config.train.steps),
        accelerator=accelerator,
    )


def _captions(plan: RunPlan, first: int) -> Iterator[str]:
    """Everything that is encoded from step ``first`` on."""
    if plan.config.data.caption_dropout:
        yield ""
    yield from plan.training.captions(range(first, plan.config.train.steps))


def _new_adapter(base: Base, config: Config) -> tuple[Adapter, list[float]]:
    """A fresh adapter on the parts that are trained, and the learning rate of each of its parameters."""
    targets = choose_targets(base.modules(), config.lora.targets)
    parts = {"unet": config.optimizer.learning_rate}
    parts |= {encoder.facts.part: config.optimizer.text_encoder_learning_rate for encoder in base.text_encoders}
    groups = [
        ({n: m for n, m in targets.items() if n.startswith(f"{part}.")}, rate) for part, rate in parts.items() if rate
    ]
    adapter = Adapter(
        [group for group, _ in groups], rank=config.lora.rank, alpha=config.lora.alpha, seed=config.train.seed
    )
    return adapter, [rate for _, rate in groups]
