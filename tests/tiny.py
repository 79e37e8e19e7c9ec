"""Checkpoints with random weights, small enough to make in a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipes.mini.export import export
from sdlora.base.load import MINI_FOLDER


def write_tiny_base(folder: Path, *, seed: int = 0, width: int = 32) -> Path:
    """An SD 1.x checkpoint with text width ``width``, for 64 px pictures; the tokenizer is that of ``mini``."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(MINI_FOLDER / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=0.18215,
    )
    folder.mkdir(parents=True)
    export(folder, vae, text_encoder, unet, tokenizer)
    return folder


def copy_base(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
