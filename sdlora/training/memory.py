"""What a training step needs on the device, from the real step on models without memory."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as recomputation

from ..base.base import Base
from ..base.checkpoint import BaseCheckpoint
from ..base.conditioning import Conditioning, Framing, time_ids
from ..base.encode import encode_prompts
from ..base.load import load_base
from ..base.tokens import padded, plain, tokenize
from ..config.sections import Config, TrainSection
from ..families import TOKENS_IN_CHUNK
from .live_bytes import LiveBytes, attention_of
from .loss import denoising_loss
from .new_adapter import new_adapter
from .optimizers.trial import OptimizerMemory, optimizer_memory
from .step_shape import StepShape

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on the device during a training step.

    Not in it: encoded images and captions that stay on the device, what the allocator rounds up and cannot reuse, workspace
    of kernels, and the context of the device (about 0.5 GB on CUDA).
    """

    weights: int
    """Frozen weights that a step reads: those of the UNet, and of the text encoders that are trained."""
    trainable: int
    """The LoRA: float32 masters, gradients and the optimizer's state, and the copies in the base's dtype."""
    activations: int
    """What the forward pass keeps for the gradients."""
    temporary: int
    """What the highest point of the step needs besides."""

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.trainable + self.activations + self.temporary


def step_memory(
    checkpoint: BaseCheckpoint,
    config: Config,
    *,
    width: int,
    height: int,
    shape: StepShape,
    dtype: torch.dtype,
    chunks: int = 1,
    device_type: str = "cuda",
) -> StepMemory:
    """What a step of ``config`` on ``checkpoint`` in ``dtype`` needs, with images of ``width`` x ``height`` pixels.

    The step is run for one image on the meta device, forward and backward, without reading a weight; what it needs grows
    in proportion to ``shape.micro_batch``. Answers are kept, so asking for other micro-batches costs nothing.

    Args:
        chunks: number of 77-token chunks of a caption.
        device_type: ``cuda``, ``mps`` or ``cpu``; decides what attention keeps.

    Raises:
        BaseModelError: a part of ``checkpoint`` cannot be built from its tensors.
    """
    # What decides nothing here would make it another question.
    config = config.model_copy(update={"train": TrainSection()})
    one = measured(checkpoint, config, 1, width, height, shape.checkpointing, dtype, chunks, device_type)
    return StepMemory(
        weights=one.weights,
        trainable=one.trainable,
        activations=one.activations * shape.micro_batch,
        temporary=one.temporary * shape.micro_batch,
    )


@lru_cache(maxsize=16)
def measured(
    checkpoint: BaseCheckpoint,
    config: Config,
    images: int,
    width: int,
    height: int,
    checkpointing: bool,
    dtype: torch.dtype,
    chunks: int,
    device_type: str,
) -> StepMemory:
    """As ``step_memory``, measured with ``images`` images at once."""
    # xformers keeps as much as torch's own kernels, and does not run on the meta device.
    base = load_base(replace(checkpoint, attention="sdpa"), device=META, dtype=dtype)
    adapter = new_adapter(base, config)
    trained = list(base.encoder_models()) if config.optimizer.text_encoder_rate(base.checkpoint.family) else []
    weights = sum(model_bytes(model) for model in (base.unet, *trained))
    modules = base.modules()
    adapter.attach(modules)
    if checkpointing:
        base.unet.enable_gradient_checkpointing(partial(_checkpointed, device_type))
    with ExitStack() as stack:
        stack.enter_context(attention_of(device_type))
        counter = stack.enter_context(LiveBytes())
        loss = stand_in_loss(base, config, images, width=width, height=height, chunks=chunks)
        kept = counter.now - loss.nbytes
        torch.autograd.backward(loss)
        highest = counter.peak
    return StepMemory(
        weights=weights,
        trainable=trainable_bytes(
            sum(parameter.numel() for parameter in adapter.parameters), dtype, optimizer_memory(config.optimizer)
        ),
        activations=kept,
        temporary=highest - kept,
    )


def _checkpointed(device_type: str, module: nn.Module, *args: Any) -> Any:
    """As diffusers does it, with attention as ``device_type`` has it in the second computation too."""
    return recomputation.checkpoint(
        module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), attention_of(device_type))
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of ``model``."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def trainable_bytes(parameters: int, dtype: torch.dtype, optimizer: OptimizerMemory) -> int:
    """Bytes of ``parameters`` trained values on a base of ``dtype``: each with a gradient and what the optimizer holds of
    it, float32; and a copy of value and gradient in ``dtype``, unless that is float32 itself."""
    copies = 0 if dtype == torch.float32 else 2 * dtype.itemsize
    return round(parameters * ((2 + optimizer.total) * torch.float32.itemsize + copies))


def stand_in_loss(base: Base, config: Config, images: int, *, width: int, height: int, chunks: int) -> Tensor:
    """The loss of ``images`` images of zeros on the device of ``base``, () float32: the work of a real one."""
    factor, channels = base.checkpoint.latent_factor, base.unet.config["in_channels"]
    shape = (images, channels, height // factor, width // factor)
    losses = denoising_loss(
        base,
        torch.zeros(shape, device=base.device),
        torch.zeros(shape, device=base.device),
        torch.zeros(images, dtype=torch.int64, device=base.device),
        _conditioning(base, config, images, chunks),
        time_ids([Framing.whole(width, height)] * images).to(base.device),
        objective=config.objective,
    )
    return losses.sum()


def _conditioning(base: Base, config: Config, images: int, chunks: int) -> Conditioning:
    """Out of the text encoders where they are trained, else as it comes out of the cache."""
    if config.optimizer.text_encoder_rate(base.checkpoint.family):
        return encode_prompts(base, [padded(base, tokenize(base, plain("")), chunks)] * images)
    return stand_in_conditioning(base, images, chunks)


def stand_in_conditioning(base: Base, rows: int, chunks: int) -> Conditioning:
    """Zeros in the shapes of ``rows`` encoded prompts of ``chunks`` chunks."""
    width = base.unet.config["cross_attention_dim"]
    widths = [encoder.model.config.projection_dim or 0 for encoder in base.text_encoders if encoder.facts.pooled]
    context = torch.zeros(rows, chunks * TOKENS_IN_CHUNK, width, dtype=base.dtype, device=base.device)
    pooled = torch.zeros(rows, widths[0], dtype=base.dtype, device=base.device) if widths else None
    return Conditioning(context=context, pooled=pooled)
