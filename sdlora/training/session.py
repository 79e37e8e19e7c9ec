"""A run in memory: encoded images, trainable layers, and the gradients of a step."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Conditioning
from ..base.encode import encode_ids
from ..cache.store import open_cache
from ..config.sections import Config
from ..data.views import View
from ..lora.adapter import Adapter, choose_targets
from ..progress import Progress
from .caption_embeddings import CaptionEmbeddings, open_caption_embeddings
from .fit import StepShape, choose_shape
from .latents import EncodedImage, encode_views
from .loss import denoising_loss
from .optimizer import GuardedAdamW
from .plan import RunPlan
from .preparation import Preparation, StepInputs, StepsAhead


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
            self._ahead.close()

    def step(self, step: int) -> Tensor:
        """Do step ``step`` (from 0); returns this process's share of its mean loss, () float32 on the device.

        The images are computed in parts of ``shape.micro_batch``, whose gradients add up in the float32 masters.
        """
        prepared = self._ahead.take(step)
        self.adapter.begin_step()
        loss = torch.zeros((), device=self.base.device)
        for inputs in prepared.parts(self.base.device, self.shape.micro_batch):
            loss += self._backward(inputs, batch_size=prepared.batch_size)
            self.adapter.end_backward()
        self.optimizer.step(step, self.accelerator)
        return loss

    def _backward(self, inputs: StepInputs, *, batch_size: int) -> Tensor:
        """Add the gradients of some images' share of the mean loss over the batch; returns that share, () float32."""
        losses = denoising_loss(
            self.base,
            inputs.latents,
            inputs.noise,
            inputs.timesteps,
            self._conditioning(inputs),
            inputs.time_ids,
            min_snr_gamma=self.plan.config.objective.min_snr_gamma,
            masks=inputs.masks,
        )
        loss = (losses * inputs.weights).sum() / batch_size
        self.optimizer.scaled(loss).backward()
        return loss.detach()

    def _conditioning(self, inputs: StepInputs) -> Conditioning:
        """That of each image; all zeros where a dropped caption is what sampling takes for an empty negative prompt."""
        if inputs.token_ids:
            conditioning = encode_ids(self.base, inputs.token_ids)
        else:
            conditioning = self.embeddings.encode(inputs.captions)
        return conditioning if inputs.zeroed is None else conditioning.zeroed(inputs.zeroed)

    @cached_property
    def _ahead(self) -> StepsAhead:
        preparation = Preparation(
            plan=self.plan,
            base=self.base,
            images=self.images,
            embeddings=self.embeddings,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        return StepsAhead(preparation, steps=self.plan.config.train.steps)


def open_session(plan: RunPlan, base: Base, accelerator: Accelerator, progress: Progress) -> TrainingSession:
    """Encode the images and make a fresh adapter and optimizer for ``plan`` on the loaded ``base``."""
    config, training = plan.config, plan.training
    views = (*training.views(config.train.steps), *training.validation)
    cache = open_cache(config.cache)
    images = encode_views(base, training.items, views, config, cache, plan.kept, progress)
    plan.kept.clear()
    embeddings = open_caption_embeddings(base, training.items, config, cache)
    adapter, rates = _new_adapter(base, config)
    return TrainingSession(
        plan=plan,
        shape=choose_shape(config.train),
        base=base,
        images=images,
        embeddings=embeddings,
        adapter=adapter,
        optimizer=GuardedAdamW(adapter.parameters, rates, config.optimizer, steps=config.train.steps, dtype=base.dtype),
        accelerator=accelerator,
    )


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
