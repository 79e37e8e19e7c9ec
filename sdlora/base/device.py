"""Facts of the device that a base computes on, known before anything is loaded on it."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What is decided by, and said of, a device."""

    kind: str
    """Type as torch has it: cuda, mps, cpu."""
    name: str
    """For people: the model of a GPU."""
    bfloat16: bool
    """Whether it multiplies bfloat16 in hardware."""
    free: int | None
    """Bytes of memory that can still be taken; None where the device does not say."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 in hardware; on Apple's Metal it counts as if it did not."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def device_facts(device: torch.device) -> DeviceFacts:
    """Ask ``device`` for its facts."""
    name = device.type
    free: int | None = None
    if device.type == "cuda":
        name, (free, _) = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
    elif device.type == "cpu":
        name, free = f"CPU with {torch.get_num_threads()} threads", psutil.virtual_memory().available
    elif device.type == "mps":
        name = "Apple GPU"
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return DeviceFacts(kind=device.type, name=name, bfloat16=multiplies_bfloat16(device), free=free)
