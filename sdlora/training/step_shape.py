"""How a step is divided so that it fits into the device's memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step holds in memory at once; it changes the time and memory of a run, and its result by rounding alone."""

    micro_batch: int
    """Images whose forward and backward pass is done at once, at most; their gradients add up over the batch."""
    checkpointing: bool
    """Whether the UNet computes its activations a second time instead of keeping them."""
