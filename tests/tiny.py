"""Checkpoints with random weights, small enough to make in a test: of every family, as folders and as single files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from recipes.mini.export import export
from sdlora.base.base import Base
from sdlora.base.checkpoint import MINI_FOLDER, find_base
from sdlora.base.load import clip_tokenizer, load_base
from sdlora.config.sections import BaseSection
from sdlora.families import FAMILIES
from tests.single_file import ldm_tensors

CPU = torch.device("cpu")


def write_tiny_base(folder: Path, *, seed: int = 0, width: int = 32) -> Path:
    """An SD 1.x checkpoint with text width ``width``, for 64 px images; the tokenizer is that of ``mini``."""
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
    export(folder, vae, text_encoder, unet, tokenizer, to_pure_noise=False)
    return folder


def copy_base(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
    },
    "sd2": {
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 96,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 48,
    },
}
_ENCODERS: dict[str, list[dict[str, Any]]] = {
    "sd1": [{"hidden_size": 64, "hidden_act": "quick_gelu"}],
    "sd2": [{"hidden_size": 96, "hidden_act": "gelu"}],
    "sdxl": [
        {"hidden_size": 64, "hidden_act": "quick_gelu"},
        {"hidden_size": 64, "hidden_act": "gelu", "projection_dim": 48},
    ],
}


def tiny_pipeline(family: str, *, seed: int = 0, prediction: str = "epsilon", **unet: Any) -> Any:
    """Diffusers' pipeline of the family, with what a published checkpoint has (heads, tokens, latent scale)."""
    torch.manual_seed(seed)
    facts = FAMILIES[family]
    encoders, tokenizers = [], []
    for encoder, sizes in zip(facts.text_encoders, _ENCODERS[family], strict=True):
        tokenizer = clip_tokenizer()
        tokenizers.append(
            CLIPTokenizer(
                vocab=tokenizer.get_vocab(),
                merges=merges_of(tokenizer),
                pad_token=encoder.pad_token,
                model_max_length=77,
            )
        )
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=1,
            max_position_embeddings=77,
            bos_token_id=49406,
            eos_token_id=49407,
            **sizes,
        )
        encoders.append((CLIPTextModelWithProjection if encoder.pooled else CLIPTextModel)(config).eval())
    model = UNet2DConditionModel(**({"sample_size": 8, "layers_per_block": 1} | _UNETS[family] | unet)).eval()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        latent_channels=4,
        sample_size=64,
        scaling_factor=facts.latent_scale,
    ).eval()
    for part in (*encoders, model, vae):
        unlike_each_other(part)
    schedule = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "prediction_type": prediction,
    }  # fmt: skip
    parts: dict[str, Any] = {"vae": vae, "unet": model, "text_encoder": encoders[0], "tokenizer": tokenizers[0]}
    if family == "sdxl":
        parts |= {"text_encoder_2": encoders[1], "tokenizer_2": tokenizers[1], "add_watermarker": False}
        parts["scheduler"] = EulerDiscreteScheduler(**schedule, timestep_spacing="leading")
        pipe: Any = StableDiffusionXLPipeline(**parts)
    else:
        parts["scheduler"] = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False)
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def unlike_each_other(model: torch.nn.Module) -> None:
    """Fresh norms are all alike, and swapping two of them would go unseen."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.05 * torch.randn_like(parameter)


def merges_of(tokenizer: CLIPTokenizer) -> list[Any]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def parts_of(pipe: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> our name -> tensor."""
    parts = {"unet": pipe.unet.state_dict(), "vae": pipe.vae.state_dict()}
    for part in ("text_encoder", "text_encoder_2"):
        if (model := getattr(pipe, part, None)) is not None:
            flat = isinstance(model, CLIPTextModel)
            parts[part] = {f"text_model.{k}" if flat else k: v for k, v in model.state_dict().items()}
    return parts


def tiny_ldm_tensors(pipe: Any, family: str) -> dict[str, torch.Tensor]:
    """As a published file has it: with schedules, counters and, in SD 2.x, one text layer more than anyone reads."""
    tensors = {k: v.clone().contiguous() for k, v in ldm_tensors(parts_of(pipe), FAMILIES[family]).items()}
    extra: dict[str, torch.Tensor] = {"alphas_cumprod": torch.zeros(1000), "model_ema.num_updates": torch.tensor(7)}
    if family == "sd1":
        extra["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if family == "sd2":
        last = "cond_stage_model.model.transformer.resblocks.2."
        extra |= {k.replace(".2.", ".3.", 1): v + 1 for k, v in tensors.items() if k.startswith(last)}
        extra["cond_stage_model.model.text_projection"] = torch.zeros(96, 96)
    if family == "sdxl":
        extra["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    return tensors | extra


def write_tiny_ldm(
    file: Path, family: str, *, seed: int = 0, metadata: dict[str, str] | None = None, **more: Any
) -> Any:
    """A single file in LDM's names; returns the pipeline that it was made from."""
    pipe = tiny_pipeline(family, seed=seed, **more)
    save_file(tiny_ldm_tensors(pipe, family), file, metadata=metadata)
    return pipe


def opened(path: Path | str, dtype: torch.dtype = torch.float32, **options: Any) -> Base:
    return load_base(find_base(BaseSection(path=str(path), **options)), device=CPU, dtype=dtype)
