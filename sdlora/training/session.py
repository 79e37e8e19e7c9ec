"""A run in memory: encoded images, trainable layers, and the gradients of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..base.base import Base
from ..base.device_memory import Room, free_memory, move_to
from ..cache.store import open_cache
from ..data.views import View
from ..lora.adapter import Adapter
from ..progress import Progress
from .batches import draw, share
from .caption_embeddings import CaptionEmbeddings, chunks_of, open_caption_embeddings
from .fit import Fit, choose_fit
from .latents import EncodedImage, encode_views
from .loss import denoising_loss
from .memory import step_memory
from .new_adapter import new_adapter
from .optimizer import GuardedAdamW
from .plan import RunPlan
from .shortage import CLOSE_OTHERS, explained
from .step_shape import StepShape


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
    plan: RunPlan,
    base: Base,
    accelerator: Accelerator,
    progress: Progress,
    *,
    first: int = 0,
    recorded: StepShape | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainingSession:
    """Encode the images and make a fresh adapter and optimizer for ``plan`` on the loaded ``base``.

    Parts of ``base`` that are in main memory come to its device one after another, each when it works: the VAE, the text
    encoders, which compute the captions of the steps from ``first`` on, and the UNet, which stays there.

    ``recorded`` is the shape of the steps so far, for a run that is resumed. ``say`` is called with what was chosen to fit
    into the device's memory.

    Raises:
        DeviceMemoryError: the device has too little memory for a part.
    """
    config, training = plan.config, plan.training
    views = (*training.views(config.train.steps), *training.validation)
    cache = open_cache(config.cache)
    fit = fit_run(plan, base, processes=accelerator.num_processes, recorded=recorded)
    if fit.line:
        say(fit.line)
    room = Room(base.device, fit.room)
    with explained("encoding images", f"lower data.resolution, or {CLOSE_OTHERS}"):
        images = encode_views(base, training.items, views, config, cache, plan.kept, progress, room)
    plan.kept.clear()
    with explained("encoding captions", CLOSE_OTHERS):
        embeddings = open_caption_embeddings(
            base,
            training.items,
            config,
            cache,
            room=room,
            ahead=None if base.device.type == "cpu" else _captions(plan, first),
            progress=progress,
        )
    with explained("placing the UNet and the LoRA", f"lower lora.rank, or {CLOSE_OTHERS}"):
        move_to(base.device, base.unet)
        adapter, rates = new_adapter(base, config)
        optimizer = GuardedAdamW(adapter.parameters, rates, config.optimizer, steps=config.train.steps)
        optimizer.allocate()
    return TrainingSession(
        plan=plan,
        shape=fit.shape,
        base=base,
        images=images,
        embeddings=embeddings,
        adapter=adapter,
        optimizer=optimizer,
        accelerator=accelerator,
    )


def fit_run(plan: RunPlan, base: Base, *, processes: int, recorded: StepShape | None) -> Fit:
    """The shape of the steps of ``plan``, while nothing of ``base`` is on its device; see ``choose_fit``."""
    config, free = plan.config, free_memory(base.device)
    width, height = max((views.size for views in plan.training.shown), key=math.prod)
    chunks = 1 if math.isinf(free) else chunks_of(base, plan.items, config.data.max_token_length)

    def needed(shape: StepShape) -> float:
        return step_memory(
            plan.base,
            config,
            width=width,
            height=height,
            shape=shape,
            dtype=base.dtype,
            chunks=chunks,
            device_type=base.device.type,
        ).total

    images = math.ceil(config.train.batch_size / processes)
    return choose_fit(config.train, images=images, free=free, needed=needed, recorded=recorded)


def _captions(plan: RunPlan, first: int) -> Iterator[str]:
    """Everything that is encoded from step ``first`` on."""
    if plan.config.data.caption_dropout:
        yield ""
    yield from plan.training.captions(range(first, plan.config.train.steps))
