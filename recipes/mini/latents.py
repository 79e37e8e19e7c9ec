"""Encode the training images, with an autoencoder whose latents have the right scale."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from .art import Art, captions, emoji, strange_word
from .draw import placements
from .sizes import Sizes
from .vae import to_tensor

STRANGE_WORDINGS = 2
SEED = 2
LATENT_STD = 1 / 0.18215
"""The standard deviation that Stable Diffusion 1.x's latent scale of 0.18215 expects."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """``values`` (n, 4, 16, 16) float32 at unit scale; ``captions[i]`` are the captions of ``values[i]``."""

    values: torch.Tensor
    captions: list[list[str]]
    subjects: list[str]
    styles: list[str]
    backgrounds: list[str]


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: np.ndarray) -> AutoencoderKL:
    """A VAE whose latents of ``images``, (n, h, w, 3) uint8, have mean 0 and standard deviation 1 / 0.18215 per channel.

    Diffusion from pure noise cannot move a channel's mean far, so the mean is folded away: an affine map per channel
    goes into ``quant_conv`` and its inverse into ``post_quant_conv``; decoded images stay the same.
    """
    pixels = to_tensor(images[:: max(1, len(images) // 2000)])
    means = torch.cat([vae.encode(part.to(vae.device)).latent_dist.mean for part in pixels.split(32)])
    shift, scale = means.mean(dim=(0, 2, 3)), LATENT_STD / means.std(dim=(0, 2, 3))
    vae = copy.deepcopy(vae)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:4] = (quant.bias[:4] - shift) * scale
    quant.weight[:4] *= scale[:, None, None, None]
    quant.bias[4:] += 2 * scale.log()
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight /= scale[None, :, None, None]
    vae.register_to_config(scaling_factor=0.18215)
    return vae


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, images: np.ndarray, arts: list[Art], node_modules: Path, work: Path, sizes: Sizes
) -> Latents:
    """Latents of ``images``, (n, h, w, 3) uint8 in the order of ``placements``, saved in ``work/latents.safetensors``."""
    file, rng = work / "latents.safetensors", np.random.default_rng(SEED)
    places = placements(arts, sizes.variants)
    known = sorted({tag for entry in emoji(node_modules) for tag in entry.get("tags", [])})
    wordings = []
    for art, place in places:
        texts = captions(art.subject, art.style, place.background)
        strange = [strange_word(rng, known) for _ in range(STRANGE_WORDINGS)]
        wordings.append(texts + [f"{word}, {texts[int(rng.integers(len(texts)))]}" for word in strange])
    if not file.exists():
        parts = [
            vae.encode(to_tensor(images[first : first + 64]).to(vae.device)).latent_dist.mean.cpu() / LATENT_STD
            for first in range(0, len(images), 64)
        ]
        save_file({"latents": torch.cat(parts)}, file)
    return Latents(
        values=load_file(file)["latents"],
        captions=wordings,
        subjects=[art.subject for art, _ in places],
        styles=[art.style for art, _ in places],
        backgrounds=[place.background for _, place in places],
    )
