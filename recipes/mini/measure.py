"""Quality of the base: PSNR of its autoencoder on held-out images, and how often it draws what the prompt says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

from .art import Art, Placement, article, compose, load_art, load_gallery
from .fidelity import Gallery
from .vae import psnr

CAPTIONS, SEEDS = 100, (0, 1)


@dataclass(frozen=True, kw_only=True)
class Quality:
    psnr: float
    """In dB."""
    fidelity: float
    same_style: float
    """Share of the images whose nearest real image has the requested style."""
    chance: float


def reference(art: Art) -> Image.Image:
    """The art in the middle of a white image."""
    return Image.fromarray(compose(art, Placement(side=112, left=8, top=8, flip=False, background="white")))


def measure(folder: Path, node_modules: Path, draw: Callable[[list[str], int], list[Image.Image]]) -> Quality:
    """``draw(prompts, seed)`` generates one image for each prompt with the base in ``folder``."""
    arts = load_art(node_modules)
    images = [reference(art) for art in arts]
    concepts = Gallery.of(images, [art.subject for art in arts])
    styles = Gallery.of(images, [art.style for art in arts])
    rng = np.random.default_rng(0)
    chosen = [arts[i] for i in rng.permutation(len(arts))[:CAPTIONS]]
    prompts = [f"{article(art.subject)}, {art.style} style, white background" for art in chosen]
    drawn = [draw(prompts, seed) for seed in SEEDS]
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    return Quality(
        psnr=psnr(vae, load_gallery(node_modules)[1]),
        fidelity=float(np.mean([concepts.fidelity(p, [art.subject for art in chosen]) for p in drawn])),
        same_style=float(np.mean([styles.fidelity(p, [art.style for art in chosen]) for p in drawn])),
        chance=1 / len({art.subject for art in arts}),
    )
