"""The device and the number format in which the frozen base computes."""

from __future__ import annotations

import torch

SMALL_UNET = 100_000_000
"""Parameters. Below it a CPU spends more time on converting than bfloat16 products save (``benchmarks/train_step.py``)."""


def choose_precision(requested: str, device: torch.device, *, unet_parameters: int) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it in hardware and the UNet is large enough to gain from it."""
    if requested != "auto":
        return getattr(torch, requested)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        gains = unet_parameters >= SMALL_UNET and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if gains else torch.float32
    return torch.float32


def choose_device() -> torch.device:
    """The first available of CUDA, Apple's Metal and the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
