"""Quality of the base: PSNR of its autoencoder on held-out images, and how often it draws what the prompt says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

from .art import Art, Placement, article, compose
from .fidelity import Gallery
from .kinds import Sources
from .vae import Carried, carried, psnr

CAPTIONS, SEEDS = 100, (0, 1)
FIRST_SUBJECTS = 136
"""Subjects of the first edition: the first of the list. The captions measured are drawn among them, as before."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of the embedded base. Fidelity is the share of images whose nearest real image shows the requested subject."""

    psnr: float
    """Of held-out emoji, in dB."""
    carried: list[Carried]
    """Kinds of art that the autoencoder was not trained on."""
    fidelity: float
    """Captions and real images of the first edition's subjects."""
    same_style: float
    """Share of those images whose nearest real image has the requested style."""
    fidelity_all: float
    """As many captions and the real images of all subjects."""
    same_style_all: float

    def __str__(self) -> str:
        kinds = "".join(f"\n  {c.kind}: {c.decibels:.1f} dB, {c.edges:.2f} of the edges' energy" for c in self.carried)
        return (
            f"held-out emoji: {self.psnr:.2f} dB{kinds}\n"
            f"first edition's subjects: fidelity {self.fidelity:.3f}, style {self.same_style:.3f}\n"
            f"all subjects: fidelity {self.fidelity_all:.3f}, style {self.same_style_all:.3f}"
        )


def reference(art: Art) -> Image.Image:
    """The art in the middle of a white image."""
    return Image.fromarray(compose(art, Placement(side=112, left=8, top=8, flip=False, background="white")))


def shown(arts: list[Art], draw: Callable[[list[str], int], list[Image.Image]]) -> tuple[float, float]:
    """(fidelity, share with the requested style) of ``CAPTIONS`` captions drawn among ``arts``, with each seed."""
    images = [reference(art) for art in arts]
    concepts = Gallery.of(images, [art.subject for art in arts])
    styles = Gallery.of(images, [art.style for art in arts])
    chosen = [arts[i] for i in np.random.default_rng(0).permutation(len(arts))[:CAPTIONS]]
    prompts = [f"{article(art.subject)}, {art.style} style, white background" for art in chosen]
    drawn = [draw(prompts, seed) for seed in SEEDS]
    return (
        float(np.mean([concepts.fidelity(p, [art.subject for art in chosen]) for p in drawn])),
        float(np.mean([styles.fidelity(p, [art.style for art in chosen]) for p in drawn])),
    )


def measure(
    folder: Path,
    arts: list[Art],
    emoji: list[np.ndarray],
    held_out: Sources,
    draw: Callable[[list[str], int], list[Image.Image]],
) -> Quality:
    """``draw(prompts, seed)`` generates one image for each prompt with the base in ``folder``."""
    known = list(dict.fromkeys(art.subject for art in arts))[:FIRST_SUBJECTS]
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    fidelity, same_style = shown([art for art in arts if art.subject in set(known)], draw)
    fidelity_all, same_style_all = shown(arts, draw)
    return Quality(
        psnr=psnr(vae, emoji), carried=carried(vae, held_out), fidelity=fidelity, same_style=same_style,
        fidelity_all=fidelity_all, same_style_all=same_style_all,
    )  # fmt: skip
