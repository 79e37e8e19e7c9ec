"""In which number format the frozen base computes."""

from __future__ import annotations

import torch


def choose_precision(wish: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it in hardware, float32 elsewhere."""
    if wish != "auto":
        return getattr(torch, wish)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.float32
