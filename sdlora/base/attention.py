"""The implementation of the UNet's attention: torch's SDPA, or xformers where it is requested and works."""

from __future__ import annotations

import logging
import re

import torch
from diffusers.models.attention_processor import XFormersAttnProcessor

from .models import UNet2DConditionModel

logger = logging.getLogger(__name__)


def use_attention(unet: UNet2DConditionModel, requested: str) -> None:
    """Set up ``auto`` or ``sdpa`` (both torch's SDPA) or ``xformers``; if that does not work, log why and keep SDPA."""
    if requested != "xformers":
        return
    reason = why_not_xformers(unet.device, unet.dtype)
    if reason is None:
        unet.set_attn_processor(XFormersAttnProcessor())
    else:
        logger.warning("xformers cannot be used: %s; using torch's own attention (sdpa)", reason)


def why_not_xformers(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why xformers does not work here; None where a real call, forward and backward, succeeds.

    It may be installed and still not work: its kernels are built for one version of CUDA and do not load with another.
    """
    try:
        from xformers import ops  # ty: ignore[import-not-found]
    except ImportError as fault:
        absent = isinstance(fault, ModuleNotFoundError) and fault.name == "xformers"
        return "it is not installed (pip install 'sdlora[xformers]')" if absent else f"it cannot be imported: {fault}"
    except (OSError, RuntimeError, AttributeError) as fault:
        return f"it cannot be imported: {fault}"
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is {device.type}"
    query = torch.zeros(1, 16, 1, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        ops.memory_efficient_attention(query, query, query).sum().backward()
        torch.cuda.synchronize(device)
    except (NotImplementedError, RuntimeError, ValueError) as fault:
        return _build_fault() or str(fault).strip().splitlines()[0]
    return None


def _build_fault() -> str | None:
    """xformers' own report of why its kernels did not load."""
    from xformers import _cpp_lib  # ty: ignore[import-not-found]

    fault = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    if fault is None:
        return None
    built = re.search(r"PyTorch \S+ with CUDA \d+", str(fault))
    what = f"they were built for {built[0]}" if built else " ".join(str(fault).split())
    return f"its kernels do not load: {what}, and this is PyTorch {torch.__version__} with CUDA {torch.version.cuda}"
