"""Add the changes of several LoRAs to a base's weights, and take them away again without a trace."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .weights import LowRank


@contextmanager
@torch.no_grad()
def merged(modules: Mapping[str, nn.Module], loras: Sequence[Mapping[str, tuple[LowRank, float]]]) -> Generator[None]:
    """Within the block, every module's weight has all its changes added: W + Σ w · ΔW, summed in float32, cast once.

    Each LoRA maps canonical module names to (change, weight). On leaving, the pristine weights are back bit for bit.

    Raises:
        KeyError: a name is not in ``modules``; RuntimeError: a change does not have its weight's shape.
    """
    originals: dict[str, torch.Tensor] = {}
    try:
        for name in sorted({name for lora in loras for name in lora}):
            weight = _weight(modules[name])
            total = weight.float()
            for change, strength in (lora[name] for lora in loras if name in lora):
                delta = change.delta().mul_(strength)
                total = total + delta.view(weight.shape).to(weight.device)
            originals[name] = weight.data
            weight.data = total.to(weight.dtype)
        yield
    finally:
        for name, original in originals.items():
            _weight(modules[name]).data = original


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{type(module).__name__} has no weight to change")
    return weight
