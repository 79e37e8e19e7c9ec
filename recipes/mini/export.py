"""Write the trained parts as a diffusers folder in float16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
    *,
    to_pure_noise: bool = True,
) -> None:
    """Fill ``folder`` so that ``StableDiffusionPipeline.from_pretrained`` opens it.

    Args:
        to_pure_noise: the UNet predicts v, on a schedule that ends in pure noise; else the noise, on that of SD 1.x.
    """
    vae.to("cpu", torch.float16).save_pretrained(folder / "vae")
    unet.to("cpu", torch.float16).save_pretrained(folder / "unet")
    # Published checkpoints nest the text encoder's keys; transformers >= 5.6 would save them flat.
    state = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in text_encoder.half().state_dict().items()}
    text_encoder.save_pretrained(folder / "text_encoder", state_dict=state)
    save_tokenizer(folder / "tokenizer", tokenizer)
    if to_pure_noise:
        how = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    else:
        how = {"prediction_type": "epsilon", "steps_offset": 1}
    DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **how
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n", encoding="utf-8")
    for config in folder.rglob("*.json"):
        _forget_paths(config)


def save_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Save ``tokenizer.json``, and vocabulary and merges for programs that read only those."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")


def _forget_paths(config: Path) -> None:
    values = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
