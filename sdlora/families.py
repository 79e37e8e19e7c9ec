"""Facts about the families of Stable Diffusion checkpoints, as data. A new family is a new table at the end.

Sizes are not here: they are read off a checkpoint's tensors. What is here cannot be read off them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Prediction = Literal["epsilon", "v_prediction", "sample"]
"""What a UNet predicts: the noise, v, or the image without noise."""
Spelling = Literal["transformers", "open_clip"]
"""The library whose names an LDM or sgm file uses for the tensors of a text encoder."""

PART_TITLES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
"""Part of a checkpoint -> what messages call it."""
PARTS = tuple(PART_TITLES)
LORA_PARTS = tuple(part for part in PARTS if part != "vae")
"""What a LoRA can change."""
TOKENS_IN_CHUNK = 77
"""What CLIP reads at once: a start mark, 75 tokens, an end mark."""
WORDS_IN_CHUNK = TOKENS_IN_CHUNK - 2


@dataclass(frozen=True, kw_only=True)
class TextEncoderFacts:
    """A CLIP text encoder of a family."""

    part: str
    """``text_encoder`` or ``text_encoder_2``."""
    spelling: Spelling
    prefixes: tuple[str, ...]
    """In LDM and sgm files, the published one first."""
    activation: str
    pad_token: str
    """What fills a prompt up to 77 tokens; open_clip fills up with token 0, which is ``!``."""
    head_width: int = 64
    unread_layers: int = 0
    """Layers at the end that LDM files hold and nothing computes."""
    pooled: bool = False
    """Whether its projected summary of the prompt is conditioning too."""


@dataclass(frozen=True, kw_only=True)
class UnetFacts:
    """What the shapes of a UNet's tensors leave open, and by what families are recognised."""

    heads: int | None = None
    """Number of attention heads, where it is the same on all levels; else their width is."""
    head_width: int | None = None
    cross_attention_dim: int
    """Width of the text embeddings in the published checkpoints; other sizes of the family have other widths."""
    linear_projection: bool
    """Whether its attention begins and ends with linear layers; else with 1 x 1 convolutions."""
    size_conditioning: bool = False
    """Whether original size, crop and target size are inputs, next to the pooled text (SDXL, section 2.2)."""
    size_embedding_width: int = 256
    """Channels for each of the six numbers, where the text encoder's pooled width, which shows it, is not known."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is true of every checkpoint of a family, whatever its size."""

    name: str
    """``sd1``, ``sd2`` or ``sdxl``, as in ``inspect --json``."""
    title: str
    upload_name: str
    """What Civitai's form calls it."""
    unet: UnetFacts
    text_encoders: tuple[TextEncoderFacts, ...]
    latent_scale: float
    """What the VAE's latents are multiplied by for the UNet."""
    resolution: int
    """Side in pixels of the square image that the published checkpoints were made for."""
    resolution_v: int
    """The same for checkpoints that predict v."""
    clip_skip: int
    """The text encoders' layer that is read, 1 being the last; the family was trained with this one."""
    clip_norm: bool
    """Whether the final layer norm is applied to that layer."""
    zeros_for_empty_negative: bool
    """Whether an empty negative prompt is all zeros rather than the empty prompt's embedding."""
    timestep_spacing: str | None
    """That of the published scheduler; None leaves it to the sampler."""
    text_encoder_learning_rate: float = 5e-5
    """Where the configuration has none; SDXL's users train the UNet alone."""
    kohya_v2: bool
    """``ss_v2``."""
    kohya_version: str
    """``ss_base_model_version`` of a LoRA for a base that predicts epsilon."""
    kohya_version_v: str
    kohya_unet_names: Literal["diffusers", "sgm"]
    """The library whose block names kohya's trainer uses in LoRA files."""
    modelspec_architecture: str
    modelspec_architecture_v: str
    modelspec_implementation: str

    @property
    def parts(self) -> tuple[str, ...]:
        """What a complete checkpoint holds, of ``PARTS``."""
        return ("unet", "vae", *(encoder.part for encoder in self.text_encoders))

    @property
    def lora_parts(self) -> tuple[str, ...]:
        """What a LoRA can change, of ``LORA_PARTS``."""
        return tuple(part for part in self.parts if part in LORA_PARTS)

    def resolution_for(self, prediction: str) -> int:
        """``resolution`` or ``resolution_v``."""
        return self.resolution_v if prediction == "v_prediction" else self.resolution


SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    upload_name="SD 1.5",
    unet=UnetFacts(heads=8, cross_attention_dim=768, linear_projection=False),
    text_encoders=(
        TextEncoderFacts(
            part="text_encoder",
            spelling="transformers",
            prefixes=("cond_stage_model.transformer.",),
            activation="quick_gelu",
            pad_token="<|endoftext|>",
        ),
    ),
    latent_scale=0.18215,
    resolution=512,
    resolution_v=512,
    clip_skip=1,
    clip_norm=True,
    zeros_for_empty_negative=False,
    timestep_spacing=None,
    kohya_v2=False,
    kohya_version="sd_v1",
    kohya_version_v="sd_v1",
    kohya_unet_names="diffusers",
    modelspec_architecture="stable-diffusion-v1/lora",
    modelspec_architecture_v="stable-diffusion-v1/lora",
    modelspec_implementation="diffusers",
)
SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    upload_name="SD 2.1",
    unet=UnetFacts(head_width=64, cross_attention_dim=1024, linear_projection=True),
    text_encoders=(
        TextEncoderFacts(
            part="text_encoder",
            spelling="open_clip",
            prefixes=("cond_stage_model.model.", "conditioner.embedders.0.model."),
            activation="gelu",
            pad_token="!",
            unread_layers=1,
        ),
    ),
    latent_scale=0.18215,
    resolution=512,
    resolution_v=768,
    clip_skip=1,
    clip_norm=True,
    zeros_for_empty_negative=False,
    timestep_spacing=None,
    kohya_v2=True,
    kohya_version="sd_v2",
    kohya_version_v="sd_v2_v",
    kohya_unet_names="diffusers",
    modelspec_architecture="stable-diffusion-v2-512/lora",
    modelspec_architecture_v="stable-diffusion-v2-768-v/lora",
    modelspec_implementation="diffusers",
)
SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    upload_name="SDXL 1.0",
    unet=UnetFacts(head_width=64, cross_attention_dim=2048, linear_projection=True, size_conditioning=True),
    text_encoders=(
        TextEncoderFacts(
            part="text_encoder",
            spelling="transformers",
            prefixes=("conditioner.embedders.0.transformer.",),
            activation="quick_gelu",
            pad_token="<|endoftext|>",
        ),
        TextEncoderFacts(
            part="text_encoder_2",
            spelling="open_clip",
            prefixes=("conditioner.embedders.1.model.",),
            activation="gelu",
            pad_token="!",
            pooled=True,
        ),
    ),
    latent_scale=0.13025,
    resolution=1024,
    resolution_v=1024,
    clip_skip=2,
    clip_norm=False,
    zeros_for_empty_negative=True,
    timestep_spacing="leading",
    text_encoder_learning_rate=0.0,
    kohya_v2=False,
    kohya_version="sdxl_base_v1-0",
    kohya_version_v="sdxl_base_v1-0",
    kohya_unet_names="sgm",
    modelspec_architecture="stable-diffusion-xl-v1-base/lora",
    modelspec_architecture_v="stable-diffusion-xl-v1-base/lora",
    modelspec_implementation="https://github.com/Stability-AI/generative-models",
)
FAMILIES = {family.name: family for family in (SD1, SD2, SDXL)}


def family_of_unet(*, linear_projection: bool, size_conditioning: bool) -> Family | None:
    """The family whose UNets are built like this (see ``UnetFacts``); None if there is none."""
    facts = (linear_projection, size_conditioning)
    known = {(family.unet.linear_projection, family.unet.size_conditioning): family for family in FAMILIES.values()}
    return known.get(facts)


def family_of_text_width(width: int) -> Family | None:
    """The family whose published UNets attend to text embeddings of ``width`` channels; None if there is none."""
    return {family.unet.cross_attention_dim: family for family in FAMILIES.values()}.get(width)
