"""Tokens to conditioning, pixels to latents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import BaseModelError
from ..families import TOKENS_IN_CHUNK
from .base import Base, TextEncoder
from .conditioning import Conditioning
from .tokens import PromptTokens

if TYPE_CHECKING:
    from .models import DiagonalGaussianDistribution


def encode_prompts(base: Base, prompts: Sequence[PromptTokens]) -> Conditioning:
    """Conditioning of prompts that all have the same number of chunks; differentiable in the text encoders.

    Each chunk is encoded separately and the results are concatenated; the pooled output is that of the first chunk. The
    outputs of several encoders are concatenated in the last axis (Podell et al. 2023, section 2.1).
    """
    encoders = range(len(base.text_encoders))
    ids = [torch.stack([prompt[number].ids for prompt in prompts]).to(base.device) for number in encoders]
    weights = [torch.stack([prompt[number].weights for prompt in prompts]) for number in encoders]
    return encode_ids(base, ids, weights)


def encode_ids(base: Base, ids: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Conditioning:
    """As ``encode_prompts``, for token ids of each text encoder, (b, chunks, 77) int64 on the base's device.

    ``weights`` of the tokens, (b, chunks, 77) float32, are on the CPU; without them every weight is 1.
    """
    contexts, pooled = [], None
    for number, (encoder, of_encoder) in enumerate(zip(base.text_encoders, ids, strict=True)):
        count = of_encoder.shape[0]
        hidden, summary = _encode(base, encoder, of_encoder.view(-1, TOKENS_IN_CHUNK))
        if weights and (weights[number] != 1).any():
            hidden = _weighted(hidden, weights[number].view(-1, TOKENS_IN_CHUNK))
        contexts.append(hidden.view(count, -1, hidden.shape[-1]))
        if summary is not None:
            pooled = summary.view(count, -1, summary.shape[-1])[:, 0]
    return Conditioning(context=torch.cat(contexts, -1), pooled=pooled)


def _encode(base: Base, encoder: TextEncoder, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ids (n, 77) -> the layer that ``clip_skip`` selects, (n, 77, width), and the pooled output, (n, width), or None."""
    layer, normed = base.checkpoint.clip_skip, base.checkpoint.family.clip_norm
    words = encoder.word_vectors
    inserted = nullcontext(ids) if words is None else words.inserted(encoder.model.get_input_embeddings(), ids)
    with inserted as plain:
        output = encoder.model(plain, output_hidden_states=layer > 1 or not normed)
    pooled = output.text_embeds if encoder.facts.pooled else None
    if layer == 1 and normed:
        return output.last_hidden_state, pooled
    hidden = output.hidden_states[-layer]
    return encoder.final_norm(hidden) if normed else hidden, pooled


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """Each token's vector times its weight, (n, 77, width), scaled back to the original mean, as A1111 does by default.

    In float32: means are close to 0, and a quotient of two that were rounded to bfloat16 changes the whole prompt.
    """
    original = hidden.float()
    result = original * weights.to(original.device)[..., None]
    return (result * (original.mean((1, 2), keepdim=True) / result.mean((1, 2), keepdim=True))).to(hidden.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """The VAE encoder's output for b images: ``mean`` and ``std``, (b, 4, h/8, w/8) float32, times the latent scale."""

    mean: Tensor
    std: Tensor


@torch.no_grad()
def encode_pixels(base: Base, pixels: Tensor) -> Posterior:
    """Pixels (b, 3, h, w) float32 in [-1, 1] -> posterior at the latent scale.

    Raises:
        BaseModelError: the VAE produced NaN or Inf.
    """
    return posterior_of(base, base.vae.encode(pixels.to(base.device, base.vae.dtype)).latent_dist)


def posterior_of(base: Base, distribution: DiagonalGaussianDistribution) -> Posterior:
    """What the VAE's encoder gave, at the latent scale.

    Raises:
        BaseModelError: it holds NaN or Inf.
    """
    scale = base.checkpoint.latent_scale
    mean, std = distribution.mean.float() * scale, distribution.std.float() * scale
    check_finite(base, mean, "the VAE")
    return Posterior(mean=mean, std=std)


def check_finite(base: Base, values: Tensor, source: str) -> None:
    """Raises ``BaseModelError``, naming ``source``, if any of ``values`` is NaN or Inf."""
    if not values.isfinite().all():
        raise BaseModelError(
            f"{base.checkpoint.name}: {source} produced NaN or Inf: the checkpoint is damaged, or its values exceed "
            f"{str(base.dtype).removeprefix('torch.')}; try precision float32, or another VAE with base.vae"
        )
