"""Add the changes of several LoRAs to a base's weights, and remove them without a trace."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .change import Change


@contextmanager
@torch.no_grad()
def temporarily_merged(
    modules: Mapping[str, nn.Module],
    loras: Sequence[Mapping[str, tuple[Change, float]]],
    *,
    in_place: bool | None = None,
) -> Generator[None]:
    """Within the block, every module's weight has all its changes added: W + Σ w · ΔW, summed in float32, cast once.

    Each LoRA maps canonical module names to (change, weight). On leaving, also by an error, the pristine weights are back
    bit for bit.

    Args:
        in_place: write into the memory of the weights, whose pristine values wait in main memory: a device holds each weight
            once, and while a module is merged two more of its weights in float32. Otherwise the pristine tensors stay where
            they are, and new ones take their place. By default a weight on the CPU is replaced, any other written in place.

    Raises:
        KeyError: a name is not in ``modules``; RuntimeError: a change does not fit its weight.
    """
    with ExitStack() as undo:
        for name in sorted({name for lora in loras for name in lora}):
            module, changes = modules[name], [lora[name] for lora in loras if name in lora]
            weight = _weight(module)
            _change(undo, weight, merged_weight(weight, changes), in_place)
            moves = [(bias, strength) for change, strength in changes if (bias := change.bias_delta()) is not None]
            if moves:
                _move_bias(undo, module, moves, in_place)
        yield


def merged_weight(weight: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """W + Σ w · ΔW of the pristine ``weight``, in a new float32 tensor of its shape."""
    total = weight.to(torch.float32, copy=True)
    for number, (change, strength) in enumerate(changes):
        pristine = weight.float() if number and change.reads_weight else total
        total.add_(change.delta(pristine), alpha=strength)
    return total


def _change(undo: ExitStack, parameter: Tensor, values: Tensor, in_place: bool | None) -> None:
    """Give ``parameter`` the ``values``, cast to its dtype, until ``undo`` closes."""
    if parameter.device.type != "cpu" if in_place is None else in_place:
        pristine = _in_main_memory(parameter)
        undo.callback(parameter.copy_, pristine, non_blocking=pristine.is_pinned())
        parameter.copy_(values)
    else:
        undo.callback(setattr, parameter, "data", parameter.data)
        parameter.data = values.to(parameter.dtype)


def _in_main_memory(parameter: Tensor) -> Tensor:
    """A copy of the values, pinned where they come from CUDA: neither way makes the host wait then."""
    on_cuda = parameter.device.type == "cuda"
    try:
        copy = torch.empty_like(parameter, device="cpu", pin_memory=on_cuda)
    except RuntimeError:
        # A system may limit how much memory is pinned.
        copy = torch.empty_like(parameter, device="cpu", pin_memory=False)
    return copy.copy_(parameter, non_blocking=copy.is_pinned())


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight to change")
    return weight


def _move_bias(
    undo: ExitStack, module: nn.Module, moves: Sequence[tuple[Tensor, float]], in_place: bool | None
) -> None:
    """Change the bias, made where there is none."""
    bias, weight = module.bias, _weight(module)
    total = bias.float() if isinstance(bias, Tensor) else torch.zeros(weight.shape[0], device=weight.device)
    for delta, strength in moves:
        total = total + strength * delta.to(total).reshape(total.shape)
    if isinstance(bias, Tensor):
        _change(undo, bias, total, in_place)
    else:
        undo.callback(module.register_parameter, "bias", None)
        module.bias = nn.Parameter(total.to(weight.dtype), requires_grad=False)
