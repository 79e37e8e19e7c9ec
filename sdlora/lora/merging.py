"""Add the changes of several LoRAs to a base's weights, and remove them without a trace."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .change import Change


@contextmanager
@torch.no_grad()
def temporarily_merged(
    modules: Mapping[str, nn.Module], loras: Sequence[Mapping[str, tuple[Change, float]]]
) -> Generator[None]:
    """Within the block, every module's weight has all its changes added: W + Σ w · ΔW, summed in float32, cast once.

    Each LoRA maps canonical module names to (change, weight). On leaving, the pristine weights are back bit for bit.

    Raises:
        KeyError: a name is not in ``modules``; RuntimeError: a change does not fit its weight.
    """
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor | None] = {}
    try:
        for name in sorted({name for lora in loras for name in lora}):
            module, changes = modules[name], [lora[name] for lora in loras if name in lora]
            weight = _weight(module)
            pristine = weight.float()
            total = pristine.clone()
            for change, strength in changes:
                total += strength * change.delta(pristine)
            weights[name] = weight.data
            weight.data = total.to(weight.dtype)
            moves = [(bias, strength) for change, strength in changes if (bias := change.bias_delta()) is not None]
            if moves:
                biases[name] = _move_bias(module, moves, weight)
        yield
    finally:
        for name, original in weights.items():
            _weight(modules[name]).data = original
        for name, original in biases.items():
            _restore_bias(modules[name], original)


def _restore_bias(module: nn.Module, original: Tensor | None) -> None:
    if original is None:
        module.register_parameter("bias", None)
    elif isinstance(module.bias, Tensor):
        module.bias.data = original


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight to change")
    return weight


def _move_bias(module: nn.Module, moves: Sequence[tuple[Tensor, float]], like: Tensor) -> Tensor | None:
    """Change the bias, made where there is none; returns the original."""
    bias = module.bias
    original = bias.data if isinstance(bias, Tensor) else None
    total = torch.zeros(like.shape[0], device=like.device) if original is None else original.float()
    for delta, strength in moves:
        total = total + strength * delta.to(total).reshape(total.shape)
    if isinstance(bias, Tensor):
        bias.data = total.to(bias.dtype)
    else:
        module.bias = nn.Parameter(total.to(like.dtype), requires_grad=False)
    return original
