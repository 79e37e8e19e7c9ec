"""A loaded base: its frozen models, and the one place where the UNet is called."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..families import TextEncoderFacts
from .checkpoint import BaseCheckpoint
from .conditioning import Conditioning
from .models import AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, UNet2DConditionModel
from .schedule import NoiseSchedule
from .word_vectors import WordVectors


@dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """A text encoder with its tokenizer."""

    facts: TextEncoderFacts
    model: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    pad_id: int
    word_vectors: WordVectors | None = None
    """Words with vectors of their own, from textual inversions."""

    @property
    def nesting(self) -> str:
        """The prefix that canonical names have and the model's own lack, where transformers (5.6 or newer) flattened it."""
        return "" if hasattr(self.model, "text_model") else "text_model."

    @property
    def final_norm(self) -> nn.Module:
        """The layer norm after the last layer."""
        return self.model.get_submodule("final_layer_norm" if self.nesting else "text_model.final_layer_norm")


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """The frozen models of a checkpoint. UNet and text encoders share one dtype; the VAE's is that or float32."""

    checkpoint: BaseCheckpoint
    unet: UNet2DConditionModel
    text_encoders: tuple[TextEncoder, ...]
    vae: AutoencoderKL
    schedule: NoiseSchedule
    device: torch.device
    """Where the base works. Parts that are idle may be in main memory meanwhile."""
    dtype: torch.dtype
    """Dtype of the UNet and the text encoders. Kept here since diffusers searches a whole model for its dtype or device."""

    def modules(self) -> dict[str, nn.Module]:
        """Canonical name -> module: the UNet, the text encoders, and every module in them, containers included."""
        named = {f"unet.{name}" if name else "unet": module for name, module in self.unet.named_modules()}
        for encoder in self.text_encoders:
            named[encoder.facts.part] = encoder.model
            for name, module in encoder.model.named_modules():
                if name:
                    named[f"{encoder.facts.part}.{encoder.nesting}{name}"] = module
        return named

    def encoder_models(self) -> tuple[nn.Module, ...]:
        """The models of the text encoders."""
        return tuple(encoder.model for encoder in self.text_encoders)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, time_ids: Tensor) -> Tensor:
        """The UNet's prediction (ε, v or x, see ``schedule.prediction``) for b noisy latents, (b, 4, h, w) float32.

        Training, validation and sampling all call the UNet here. Gradients flow to ``noisy``, ``conditioning`` and
        whatever layers are attached.

        Args:
            noisy: (b, 4, h, w) at the latent scale, float32; computed in the base's dtype.
            timesteps: (b,), or () for the same timestep in every row; int64, or float32 where a sampler has it so.
            conditioning: b rows.
            time_ids: (b, 6) float32, made by ``time_ids``; only families with size conditioning (SDXL) read them.
        """
        added = self._added_conditions(conditioning, time_ids)
        latents = noisy.to(self.dtype)
        return self.unet(latents, timesteps, conditioning.context, added_cond_kwargs=added, return_dict=False)[
            0
        ].float()

    def _added_conditions(self, conditioning: Conditioning, time_ids: Tensor) -> dict[str, Tensor] | None:
        """diffusers' ``added_cond_kwargs``; None where the family has no size conditioning."""
        if not self.checkpoint.family.unet.size_conditioning or conditioning.pooled is None:
            return None
        return {"text_embeds": conditioning.pooled, "time_ids": time_ids}
