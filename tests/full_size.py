"""Bases of the published sizes on the meta device, and a watch over what crosses between it and main memory.

The meta device computes shapes alone, so it stands in for an accelerator of any size: a value that is read back raises, as
does a tensor that was left in main memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdlora.base.base import Base, TextEncoder
from sdlora.base.checkpoint import find_base
from sdlora.base.load import clip_tokenizer
from sdlora.base.schedule import NoiseSchedule
from tests.published import published

META = torch.device("meta")
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def full_size_base(like: Path, dtype: torch.dtype) -> Base:
    """A base with the models of the published size of ``like``, a checkpoint of the family."""
    checkpoint = find_base(str(like))
    family, parts = checkpoint.family, {}
    for part, model in published(family.name).items():
        parts[part] = model.to(dtype).requires_grad_(False).eval()
    for encoder in family.text_encoders:
        for module in parts[encoder.part].modules():
            if isinstance(getattr(module, "position_ids", None), torch.Tensor):
                module.position_ids = torch.arange(77, device=META).expand(1, -1)
    tokenizer = clip_tokenizer()
    return Base(
        checkpoint=checkpoint,
        unet=parts["unet"],
        text_encoders=tuple(
            TextEncoder(
                facts=facts,
                model=parts[facts.part],
                tokenizer=tokenizer,
                pad_id=tokenizer.get_vocab()[facts.pad_token],
            )
            for facts in family.text_encoders
        ),
        vae=parts["vae"],
        schedule=NoiseSchedule.of(checkpoint.schedule).to(META),
        device=META,
        dtype=dtype,
    )


class Watch(TorchDispatchMode):
    """Counts copies from main memory to the device, and refuses operators that would take tensors of both.

    A tensor of no dimensions counts as a number, which operators take from anywhere without waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
        at_hand = [tensor for tensor in tensors if tensor.device != META]
        if at_hand and len(at_hand) < len(tensors):
            assert func in _COPIES, f"{func} takes a tensor that was left in main memory: {at_hand[0].shape}"
            self.copied.append(at_hand[0].shape)
        return result
