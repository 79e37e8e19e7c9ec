"""Facts about the families of Stable Diffusion checkpoints, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """What holds for every checkpoint of a family, whatever its size."""

    name: str
    """``sd1``, ``sd2`` or ``sdxl``, as ``inspect --json`` says it."""
    title: str
    cross_attention_dim: int
    """Width of the text embeddings in the published checkpoints."""
    kohya_version: str
    """``ss_base_model_version`` of an epsilon-prediction base."""
    modelspec_architecture: str
    modelspec_implementation: str
    two_text_encoders: bool


SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    cross_attention_dim=768,
    kohya_version="sd_v1",
    modelspec_architecture="stable-diffusion-v1/lora",
    modelspec_implementation="diffusers",
    two_text_encoders=False,
)
SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    cross_attention_dim=1024,
    kohya_version="sd_v2",
    modelspec_architecture="stable-diffusion-v2-512/lora",
    modelspec_implementation="diffusers",
    two_text_encoders=False,
)
SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    cross_attention_dim=2048,
    kohya_version="sdxl_base_v1-0",
    modelspec_architecture="stable-diffusion-xl-v1-base/lora",
    modelspec_implementation="https://github.com/Stability-AI/generative-models",
    two_text_encoders=True,
)
FAMILIES = {family.name: family for family in (SD1, SD2, SDXL)}
