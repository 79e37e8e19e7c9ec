"""LoRA files of one module, and lists of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import sdlora
from sdlora.library.entry import LoraLibrary
from sdlora.progress import Silence

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def listed(folder: Path, **options: Any) -> LoraLibrary:
    return sdlora.list_loras(folder, progress=Silence(), **options)


def write(file: Path, *, seed: int = 0, rank: int = 4, width: int = 768, **metadata: str) -> Path:
    """One module of kohya's; of SD 1.x with text width 768."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{KEY}.lora_down.weight": torch.randn(rank, width, generator=generator),
        f"{KEY}.lora_up.weight": torch.randn(320, rank, generator=generator),
        f"{KEY}.alpha": torch.tensor(1.0),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata=metadata or None)
    return file
