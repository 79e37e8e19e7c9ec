"""What decides the memory of a step besides the settings: sizes of images and captions, and what computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..base.base import Base
from ..base.checkpoint import BaseCheckpoint
from ..config.sections import Config
from .caption_embeddings import chunks_of
from .memory import StepMemory, step_memory
from .plan import RunPlan
from .step_shape import StepShape


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """The sizes of the largest step of a run."""

    width: int
    height: int
    """Size of the largest images in pixels."""
    chunks: int
    """Number of 77-token chunks of a caption."""
    dtype: torch.dtype
    device_type: str

    @classmethod
    def of(cls, plan: RunPlan, base: Base, device_type: str) -> StepSizes:
        """Those of ``plan`` on the loaded ``base``, as a device of ``device_type`` would need them."""
        width, height = max((views.size for views in plan.training.shown), key=math.prod)
        chunks = chunks_of(base, plan.items, plan.config.data.max_token_length)
        return cls(width=width, height=height, chunks=chunks, dtype=base.dtype, device_type=device_type)

    def needed(self, checkpoint: BaseCheckpoint, config: Config, shape: StepShape) -> StepMemory:
        """What a step of this ``shape`` needs; see ``step_memory``."""
        return step_memory(
            checkpoint,
            config,
            width=self.width,
            height=self.height,
            shape=shape,
            dtype=self.dtype,
            chunks=self.chunks,
            device_type=self.device_type,
        )
