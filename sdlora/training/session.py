"""A run in memory: encoded images, trainable layers, and the gradients of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch
from accelerate import Accelerator
from torch import Tensor

from ..base.base import Base
from ..base.compiling import compile_blocks, restore_blocks
from ..base.conditioning import Conditioning
from ..base.device_memory import Room, free_memory, move_to
from ..base.encode import encode_ids
from ..cache.store import open_cache
from ..data.views import View
from ..lora.adapter import Adapter
from ..progress import Progress
from .caption_embeddings import CaptionEmbeddings, open_caption_embeddings
from .fit import Fit, choose_fit
from .latents import EncodedImage, encode_views
from .loss import denoising_loss
from .new_adapter import RateGroup, new_adapter
from .optimizer import GuardedAdamW
from .plan import RunPlan
from .preparation import Preparation, StepInputs, StepsAhead
from .processes import same_in_all
from .rates import steps_of
from .shortage import CLOSE_OTHERS, explained
from .step_shape import StepShape
from .step_sizes import StepSizes


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSession:
    """What every step of a run needs."""

    plan: RunPlan
    shape: StepShape
    base: Base
    images: Mapping[View, EncodedImage]
    embeddings: CaptionEmbeddings
    adapter: Adapter[RateGroup]
    optimizer: GuardedAdamW
    accelerator: Accelerator
    compiled: bool
    """Whether the UNet's transformer blocks are compiled."""

    @contextmanager
    def attached(self) -> Generator[None]:
        """Within the block, the layers are in the base, and the UNet checkpoints gradients if ``shape`` says so."""
        modules, checkpointing = self.base.modules(), self.shape.checkpointing
        self.adapter.attach(modules)
        if checkpointing:
            self.base.unet.enable_gradient_checkpointing()
        if self.compiled:
            compile_blocks(self.base.unet)
        try:
            yield
        finally:
            if self.compiled:
                restore_blocks(self.base.unet)
            if checkpointing:
                self.base.unet.disable_gradient_checkpointing()
            self.adapter.detach(modules)
            self._ahead.close()

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Within the block, between steps, the layers have the values that are kept of the steps so far.

        Whatever is saved, sampled or validated is taken within it.
        """
        with self.optimizer.averaged():
            self.adapter.begin_step()
            yield

    @contextmanager
    def holding(self, values: Sequence[Tensor]) -> Generator[None]:
        """Within the block, between steps, the layers have ``values``, one for each of the adapter's ``parameters``.

        After it the parameters have their own again, to the bit.
        """
        parameters = [parameter.detach() for parameter in self.adapter.parameters]
        own = [parameter.clone() for parameter in parameters]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
        self.adapter.begin_step()
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)

    def step(self, step: int) -> Tensor:
        """Do step ``step`` (from 0); returns this process's share of its mean loss, () float32 on the device.

        The images are computed in parts of ``shape.micro_batch``, whose gradients add up in the float32 masters.
        """
        prepared = self._ahead.take(step)
        self.adapter.begin_step()
        loss = torch.zeros((), device=self.base.device)
        for inputs in prepared.parts(self.base.device, self.shape.micro_batch):
            with self.adapter.dropout.drawn_by(inputs.dropout_keys):
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
            objective=self.plan.config.objective,
            input_noise=inputs.input_noise,
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
        return StepsAhead(preparation, steps=self.plan.steps)


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
        ProcessLostError: another process has ended.
    """
    config, training = plan.config, plan.training
    views = (*training.views(plan.steps), *training.validation)
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
        adapter = new_adapter(base, config, {} if plan.start is None else plan.start.changes)
        if accelerator.num_processes > 1:
            # Another machine may have made another start: signs of singular vectors are free.
            for tensor in (*adapter.parameters, *adapter.fixed.values()):
                same_in_all(tensor.detach())
        optimizer = _optimizer(plan, adapter, base.dtype)
    return TrainingSession(
        plan=plan,
        shape=fit.shape,
        base=base,
        images=images,
        embeddings=embeddings,
        adapter=adapter,
        optimizer=optimizer,
        accelerator=accelerator,
        compiled=config.train.compile,
    )


def _optimizer(plan: RunPlan, adapter: Adapter[RateGroup], dtype: torch.dtype) -> GuardedAdamW:
    config = plan.config
    limit = config.lora.max_norm
    return GuardedAdamW(
        adapter.parameters,
        [group.rate for group in adapter.groups],
        config.optimizer,
        steps=plan.steps,
        earlier=plan.length.ends[:-1],
        lengths=[
            steps_of(group.part, config.optimizer, steps=plan.steps, planned=plan.length.planned)
            for group in adapter.groups
        ],
        shapes=adapter.shapes,
        dtype=dtype,
        seed=config.train.seed,
        after_update=None if limit is None else partial(adapter.limit_norms, limit),
    )


def fit_run(plan: RunPlan, base: Base, *, processes: int, recorded: StepShape | None) -> Fit:
    """The shape of the steps of ``plan``, while nothing of ``base`` is on its device; see ``choose_fit``."""
    config = plan.config
    # Only a device whose memory has an end is asked what a step needs.
    sizes = cache(lambda: StepSizes.of(plan, base, base.device.type))
    images = math.ceil(config.train.batch_size / processes)
    return choose_fit(
        config.train,
        images=images,
        free=free_memory(base.device),
        needed=lambda shape: sizes().needed(plan.base, config, shape).total,
        recorded=recorded,
    )


def _captions(plan: RunPlan, first: int) -> Iterator[str]:
    """Everything that is encoded from step ``first`` on."""
    if plan.config.data.caption_dropout:
        yield ""
    yield from plan.training.captions(range(first, plan.steps))
