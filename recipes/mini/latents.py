"""Encode the training images, with an autoencoder whose latents have the right scale."""

from __future__ import annotations

import copy
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from .art import Art, Placement, captions, compose, draw_placement, emoji, strange_word
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


def composed(places: list[tuple[Art, Placement]]) -> list[np.ndarray]:
    """The images, uint8 (128, 128, 3) each, drawn by all cores."""
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.starmap(compose, places, chunksize=64)


@torch.no_grad()
def standardise(vae: AutoencoderKL, arts: list[Art]) -> AutoencoderKL:
    """A VAE whose latents of the training images have mean 0 and standard deviation 1 / 0.18215 in every channel.

    Diffusion from pure noise cannot move a channel's mean far, so the mean is folded away: an affine map per channel
    goes into ``quant_conv`` and its inverse into ``post_quant_conv``; decoded images stay the same.
    """
    rng = np.random.default_rng(SEED)
    pixels = to_tensor([compose(art, draw_placement(rng, art.mirror)) for art in arts])
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
def encode_all(vae: AutoencoderKL, arts: list[Art], node_modules: Path, work: Path, sizes: Sizes) -> Latents:
    """Latents of every drawing in ``sizes.variants`` placements, saved in ``work/latents.safetensors``."""
    file, rng = work / "latents.safetensors", np.random.default_rng(SEED)
    places = [(art, draw_placement(rng, art.mirror)) for art in arts for _ in range(sizes.variants)]
    known = sorted({tag for entry in emoji(node_modules) for tag in entry.get("tags", [])})
    wordings = []
    for art, place in places:
        texts = captions(art.subject, art.style, place.background)
        strange = [strange_word(rng, known) for _ in range(STRANGE_WORDINGS)]
        wordings.append(texts + [f"{word}, {texts[int(rng.integers(len(texts)))]}" for word in strange])
    if not file.exists():
        parts = [
            vae.encode(to_tensor(images).to(vae.device)).latent_dist.mean.cpu() / LATENT_STD
            for first in range(0, len(places), 4096)
            for images in _batches(composed(places[first : first + 4096]), 32)
        ]
        save_file({"latents": torch.cat(parts)}, file)
    return Latents(
        values=load_file(file)["latents"],
        captions=wordings,
        subjects=[art.subject for art, _ in places],
        styles=[art.style for art, _ in places],
        backgrounds=[place.background for _, place in places],
    )


def _batches(images: list[np.ndarray], size: int) -> list[list[np.ndarray]]:
    return [images[first : first + size] for first in range(0, len(images), size)]
