"""Memory of a device: which parts of a base are there, what else finds room, and what being out of memory looks like."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SIGNS = ("out of memory", "not enough memory", "alloc_failed", "can't allocate memory")
"""What a ``RuntimeError`` says where torch has no class of its own: Metal, the CPU, and CUDA's libraries."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device, or the main memory, has no room left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take on ``device``; infinite for the CPU, where nothing has to be chosen."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return math.inf


def release_memory(device: torch.device) -> None:
    """Give back what torch holds of ``device`` without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@contextmanager
def working_on(device: torch.device, *models: nn.Module) -> Generator[None]:
    """Within the block, ``models`` are on ``device``; afterwards they have the same tensors in main memory as before.

    So nothing is copied back, and the block must not change them. A model that is on ``device`` already is left alone.
    """
    idle = [model for model in models if not _is_on(device, model)]
    tables: list[dict[str, Any]] = [
        table for model in idle for module in model.modules() for table in (module._parameters, module._buffers)
    ]
    places = [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]
    copies: dict[int, Tensor] = {}
    try:
        for table, name, tensor in places:
            if id(tensor) not in copies:
                copies[id(tensor)] = _copy(tensor, device)
            table[name] = copies[id(tensor)]
        yield
    finally:
        for table, name, tensor in places:
            table[name] = tensor
        copies.clear()
        if idle:
            release_memory(device)


def move_to(device: torch.device, *models: nn.Module) -> None:
    """Move ``models`` to ``device``, where they stay. A model that is there already is left alone."""
    for model in models:
        if not _is_on(device, model):
            model.to(device)


def cast(dtype: torch.dtype, *models: nn.Module) -> None:
    """Cast ``models`` where they are, one tensor after another."""
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _is_on(device: torch.device, model: nn.Module) -> bool:
    return all(parameter.device.type == device.type for parameter in model.parameters())


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.detach().to(device)
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


class Room:
    """Room on a device for what is computed once and read in each step. What finds none stays in main memory."""

    def __init__(self, device: torch.device, size: float = math.inf):
        """``size`` is in bytes."""
        self.device, self.left = device, size

    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``tensors`` on the device if there is room for all of them, else in main memory.

        Main memory is pinned where the device is CUDA, so a copy to the device makes nobody wait.
        """
        needed = sum(tensor.nbytes for tensor in tensors)
        if needed <= self.left:
            self.left -= needed
            return [tensor.to(self.device) for tensor in tensors]
        spilled = [tensor.cpu() for tensor in tensors]
        return [tensor.pin_memory() for tensor in spilled] if self.device.type == "cuda" else spilled
