"""The device and the number format in which the frozen base computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.choices import PRECISIONS
from ..errors import SdloraError
from .device import DeviceFacts, device_facts

SMALL_UNET = 100_000_000
"""Parameters. Below this, a CPU spends more time on conversions than bfloat16 saves (``benchmarks/train_step.py``)."""


@dataclass(frozen=True, kw_only=True)
class ChosenPrecision:
    """A dtype, and why it was chosen, as an end of a sentence."""

    dtype: torch.dtype
    reason: str


def choose_device() -> torch.device:
    """The first available of CUDA, Apple's Metal and the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(
    requested: str, device: torch.device, *, unet_parameters: int, generating: bool = False
) -> torch.dtype:
    """The dtype of ``explain_precision`` on ``device``, which raises the same."""
    return explain_precision(
        requested, device_facts(device), unet_parameters=unet_parameters, generating=generating
    ).dtype


def explain_precision(
    requested: str, facts: DeviceFacts, *, unet_parameters: int, generating: bool = False
) -> ChosenPrecision:
    """The dtype for ``requested``, one of ``PRECISIONS``, and the reason.

    ``auto`` depends on the device, on the size of the UNet and on ``generating`` only. A GPU trains in bfloat16 where it
    multiplies it in hardware, else in float16; it generates in float16, whose rounding keeps more of what a LoRA adds to a
    weight. A CPU takes bfloat16 where it multiplies it in hardware and the UNet is large enough to gain from it, else
    float32.

    Raises:
        SdloraError: an unknown precision.
    """
    if requested not in PRECISIONS:
        raise SdloraError(f"precision {requested!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if requested != "auto":
        return ChosenPrecision(dtype=getattr(torch, requested), reason="as set")
    if facts.kind in ("cuda", "mps"):
        if generating:
            return ChosenPrecision(dtype=torch.float16, reason="it rounds merged weights less than bfloat16")
        if facts.bfloat16:
            return ChosenPrecision(dtype=torch.bfloat16, reason="the GPU multiplies it in hardware")
        known = "bfloat16 is not used on Apple GPUs" if facts.kind == "mps" else "the GPU has no bfloat16 in hardware"
        return ChosenPrecision(dtype=torch.float16, reason=known)
    if facts.kind != "cpu":
        return ChosenPrecision(dtype=torch.float32, reason="nothing else has been tried on this kind of device")
    if not facts.bfloat16:
        return ChosenPrecision(dtype=torch.float32, reason="this CPU does not multiply bfloat16 in hardware")
    if unet_parameters < SMALL_UNET:
        return ChosenPrecision(dtype=torch.float32, reason="the UNet is too small to gain from bfloat16")
    return ChosenPrecision(dtype=torch.bfloat16, reason="the CPU multiplies it in hardware")


def describe_precision(facts: DeviceFacts, chosen: ChosenPrecision) -> str:
    """One line for people on where and how a run computes."""
    free = "unknown" if facts.free is None else f"{facts.free / 1e9:.1f} GB"
    precision = str(chosen.dtype).removeprefix("torch.")
    return f"device: {facts.name} ({facts.kind}), precision: {precision} ({chosen.reason}), free memory: {free}"
