"""Words to conditioning, pixels to latents, latents to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .load import Base


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """What the encoder says of a picture: ``mean`` and ``std``, (b, 4, h/8, w/8) float32, times the latent scale."""

    mean: Tensor
    std: Tensor


def tokenize(base: Base, prompts: Sequence[str]) -> Tensor:
    """(b, 77) int64 on the base's device; what is longer is cut off (``token_overflow`` tells)."""
    rows = base.tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=base.tokenizer.model_max_length
    )
    return torch.tensor(rows.input_ids, device=base.device)


def token_overflow(base: Base, prompt: str) -> int:
    """How many tokens of ``prompt`` lie behind the encoder's last."""
    return max(0, len(base.tokenizer(prompt).input_ids) - base.tokenizer.model_max_length)


def encode_tokens(base: Base, ids: Tensor) -> Tensor:
    """(b, 77) -> (b, 77, width): the text encoder's last hidden state, layer-normed, in the base's dtype."""
    return base.text_encoder(ids).last_hidden_state


@torch.no_grad()
def encode_pixels(base: Base, pixels: Tensor) -> Posterior:
    """(b, 3, h, w) float32 in [-1, 1] -> posterior at the latent scale."""
    distribution = base.vae.encode(pixels.to(base.device, base.vae.dtype)).latent_dist
    scale = base.vae.config["scaling_factor"]
    return Posterior(mean=distribution.mean.float() * scale, std=distribution.std.float() * scale)


@torch.no_grad()
def decode_latents(base: Base, latents: Tensor) -> Tensor:
    """(b, 4, h, w) at the latent scale -> (b, 3, 8h, 8w) float32 in [0, 1]."""
    decoded = base.vae.decode(latents.to(base.vae.dtype) / base.vae.config["scaling_factor"]).sample
    return decoded.float().div(2).add(0.5).clamp(0, 1)
