"""How much is trained: on a GPU in minutes, on two CPU cores in hours."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdlora.base.device import multiplies_bfloat16


def trains_in_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are the faster ones: on CPUs also by AVX-512, which gains less than AMX does."""
    return multiplies_bfloat16(device) or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def lowered(device: torch.device) -> torch.autocast:
    """Within it, products are in bfloat16 where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=trains_in_bfloat16(device))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Steps, batches and time limits (seconds) of the stages."""

    device: torch.device
    pool: int
    """Images drawn for the autoencoder, a multiple of 50."""
    variants: int
    """Placements of each drawing that the diffusion model learns from."""
    vae_steps: int
    vae_batch: int
    """Crops of 64 px; whole images come in quarters of it."""
    text_steps: int
    text_batch: int
    unet_steps: int
    unet_batch: int
    vae_seconds: float = float("inf")
    text_seconds: float = float("inf")
    unet_seconds: float = float("inf")
    rate: float = 1.0
    """Of the usual learning rates: less where the parts are trained already."""


def sizes_for(device: torch.device, *, seconds: float | None, small: bool) -> Sizes:
    """Those for ``device``.

    Args:
        seconds: limit of everything after the drawing; the UNet has what the other stages leave of it. None for no limit.
        small: a trial that ends within a minute or two and learns next to nothing.
    """
    limits = {} if seconds is None else {"vae_seconds": 0.36 * seconds, "text_seconds": 0.06 * seconds}
    if small:
        return Sizes(
            device=device, pool=400, variants=2, vae_steps=6, vae_batch=16, text_steps=4, text_batch=16, unet_steps=4,
            unet_batch=16, **limits,
        )  # fmt: skip
    if device.type == "cpu":
        return Sizes(
            device=device, pool=20_000, variants=24, vae_steps=6_000, vae_batch=24, text_steps=1_500, text_batch=48,
            unet_steps=8_000, unet_batch=32, **limits,
        )  # fmt: skip
    return Sizes(
        device=device, pool=20_000, variants=24, vae_steps=9_000, vae_batch=192, text_steps=2_500, text_batch=256,
        unet_steps=12_000, unet_batch=512, **limits,
    )  # fmt: skip
