"""Add the changes of several LoRAs to a module's weight, in the memory of the weight, and remove them without a trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .change import Change
from .low_rank import LowRank, joined

ELEMENTS_AT_ONCE = 2**18
"""Elements of a weight that are summed at once on the CPU: a megabyte of float32."""
Weighted = tuple[Change, float]
"""A change and what it is multiplied by."""


def merged_weight(weight: Tensor, changes: Sequence[Weighted]) -> Tensor:
    """W + Σ w · ΔW of the pristine ``weight``, in a new float32 tensor of its shape.

    All low-rank changes are one product of matrices, whose ranks add up.
    """
    total = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(weight)
    others = [(change, strength) for change, strength in changes if not isinstance(change, LowRank)]
    for number, (change, strength) in enumerate(others):
        pristine = weight.float() if number and change.reads_weight else total
        total.add_(change.delta(pristine), alpha=strength)
    low_rank = [(change, strength) for change, strength in changes if isinstance(change, LowRank)]
    if low_rank:
        down, up = joined(low_rank, total)
        total.view(len(total), -1).addmm_(up, down)
    return total


def merge_into(weight: Tensor, pristine: Tensor, changes: Sequence[Weighted]) -> None:
    """Write ``merged_weight`` into ``weight``, which may be ``pristine`` itself, rounded once to its dtype.

    Low-rank changes are added to some rows at a time on the CPU, so that the float32 sum stays in its cache: the same bits,
    in half the time for large weights.

    Raises:
        RuntimeError: a change does not fit; some rows may be written then.
    """
    low_rank = [(change, strength) for change, strength in changes if isinstance(change, LowRank)]
    in_rows = weight.device.type == "cpu" and weight.is_contiguous() and pristine.is_contiguous()
    if len(low_rank) < len(changes) or not in_rows:
        weight.copy_(merged_weight(pristine, changes))
        return
    down, up = joined(low_rank, torch.empty(0))
    target, source = weight.view(len(weight), -1), pristine.view(len(weight), -1)
    if len(up) != len(target):
        raise RuntimeError(f"a change of {len(up)} outputs does not fit a weight of {len(target)}")
    at_once = min(len(target), max(1, ELEMENTS_AT_ONCE // target.shape[1]))
    buffer = torch.empty(at_once, target.shape[1])
    for first in range(0, len(target), at_once):
        rows = slice(first, min(first + at_once, len(target)))
        total = buffer[: rows.stop - first].copy_(source[rows])
        target[rows] = total.addmm_(up[rows], down)


class MergedModule:
    """A module whose weight and bias may have changes added; their pristine values wait in main memory.

    Everything is written into the memory of the parameters, so compiled code and CUDA graphs stay valid. A device holds each
    weight once, and while a module is merged one more of its weights in float32. A bias is made where a change needs one
    that the module lacks.
    """

    def __init__(self, module: nn.Module):
        """Raises ``TypeError`` where ``module`` has no weight."""
        weight = module.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{type(module).__name__} has no weight to change")
        self._module, self._weight = module, weight
        self._bias = bias if isinstance(bias := getattr(module, "bias", None), Tensor) else None
        self._pristine = _in_main_memory(weight)
        self._pristine_bias: Tensor | None = None
        self.changes: tuple[Weighted, ...] = ()
        """What is added at present."""

    @torch.no_grad()
    def set(self, changes: tuple[Weighted, ...]) -> None:
        """Give the weight W + Σ w · ΔW, summed in float32 and rounded once, and the bias likewise.

        Raises:
            RuntimeError: a change does not fit; ``restore`` puts the pristine values back.
        """
        source = self._pristine.to(self._weight.device, non_blocking=True) if self.changes else self._weight
        merge_into(self._weight, source, changes)
        moves = [(bias, strength) for change, strength in changes if (bias := change.bias_delta()) is not None]
        self._set_bias(moves)
        self.changes = changes

    @torch.no_grad()
    def restore(self) -> None:
        """Put the pristine bits back."""
        self._weight.copy_(self._pristine, non_blocking=self._pristine.is_pinned())
        self._set_bias(())
        self.changes = ()

    def _set_bias(self, moves: Sequence[tuple[Tensor, float]]) -> None:
        bias = self._bias
        if not moves and bias is None:
            if getattr(self._module, "bias", None) is not None:
                self._module.register_parameter("bias", None)
            return
        if not moves:
            if bias is not None and self._pristine_bias is not None:
                bias.copy_(self._pristine_bias)
                self._pristine_bias = None
            return
        total = torch.zeros(self._weight.shape[0], device=self._weight.device)
        if bias is not None and self._pristine_bias is None:
            self._pristine_bias = _in_main_memory(bias)
            total += bias
        elif self._pristine_bias is not None:
            # Copied first and converted there: the host would convert what CUDA may not have written yet.
            total += self._pristine_bias.to(total.device)
        for delta, strength in moves:
            total += strength * delta.to(total).reshape(total.shape)
        if bias is not None:
            bias.copy_(total)
        else:
            self._module.bias = nn.Parameter(total.to(self._weight.dtype), requires_grad=False)


def _in_main_memory(parameter: Tensor) -> Tensor:
    """A copy of the values, pinned where they come from CUDA: neither way makes the host wait then."""
    on_cuda = parameter.device.type == "cuda"
    values = parameter.detach()
    try:
        copy = torch.empty_like(values, device="cpu", pin_memory=on_cuda)
    except RuntimeError:
        # A system may limit how much memory is pinned.
        copy = torch.empty_like(values, device="cpu", pin_memory=False)
    return copy.copy_(values, non_blocking=copy.is_pinned())
