"""The device and the number format in which the frozen base computes."""

from __future__ import annotations

import torch

from ..errors import SdloraError

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
SMALL_UNET = 100_000_000
"""Parameters. Below this, a CPU spends more time on conversions than bfloat16 saves (``benchmarks/train_step.py``)."""


def choose_device() -> torch.device:
    """The first available of CUDA, Apple's Metal and the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(
    requested: str, device: torch.device, *, unet_parameters: int, generating: bool = False
) -> torch.dtype:
    """The dtype for ``requested``, one of ``PRECISIONS``.

    ``auto`` is bfloat16 where the device computes with it in hardware and the UNet is large enough to gain from it, else
    float32. It depends on the device, on the size of the UNet and on ``generating`` only: a GPU generates in float16, whose
    rounding keeps more of what a LoRA adds to a weight.

    Raises:
        SdloraError: an unknown precision.
    """
    if requested not in PRECISIONS:
        raise SdloraError(f"precision {requested!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if requested != "auto":
        return getattr(torch, requested)
    if generating and device.type in ("cuda", "mps"):
        return torch.float16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        gains = unet_parameters >= SMALL_UNET and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if gains else torch.float32
    return torch.float32
