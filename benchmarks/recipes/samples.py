"""The sample sets, split, and what the base draws for neutral captions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.mini.art import article
from sdlora.base.base import Base
from sdlora.generation.request import ImageRequest
from sdlora.generation.studio import Studio
from sdlora.progress import Silence
from tests.conftest import ROOT
from tests.measures import TRIGGERS, unseen_subjects

EVERY, FIRST = 6, 2
"""In order of their names, the third image of each six is held out: 6 of 36."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is drawn."""

    subjects: int = 12
    image_steps: int = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Images that nobody trains on, as latents (n, 4, h, w) float32, with their captions."""

    latents: Tensor
    captions: tuple[str, ...]


def split(style: str, folder: Path) -> tuple[Path, Path]:
    """Copy the sample set ``style`` into two folders in ``folder``: images to train on, and held-out ones."""
    train, held = folder / "sets" / style / "train", folder / "sets" / style / "held-out"
    for number, file in enumerate(sorted((ROOT / "datasets" / style).glob("*.png"))):
        place = held if number % EVERY == FIRST else train
        place.mkdir(parents=True, exist_ok=True)
        for each in (file, file.with_suffix(".txt")):
            shutil.copy(each, place / each.name)
    return train, held


def pixels(files: Sequence[Path], side: int) -> Tensor:
    """Square images as (n, 3, side, side) float32 in [-1, 1]."""
    images = [Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for file in files]
    stacked = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in images]) / 127.5 - 1)
    return stacked.permute(0, 3, 1, 2)


@torch.no_grad()
def held_out(base: Base, folder: Path) -> Examples:
    """The images of ``folder``, encoded by diffusers' VAE alone: the mean of its posterior."""
    files = sorted(folder.glob("*.png"))
    mean = base.vae.encode(pixels(files, base.checkpoint.resolution)).latent_dist.mean
    mean = mean * base.vae.config.scaling_factor
    return Examples(latents=mean, captions=tuple(file.with_suffix(".txt").read_text().strip() for file in files))


def neutral_prompts(subjects: int) -> tuple[str, ...]:
    """Captions in the base's own styles, without a trigger word, of subjects that the sample sets do not show."""
    styles = ("noto", "fluent", "twemoji")
    return tuple(
        f"{article(subject)}, {styles[number % 3]} style, white background"
        for number, subject in enumerate(unseen_subjects()[:subjects])
    )


def neutral_requests(sizes: Sizes) -> list[ImageRequest]:
    """One image of each neutral caption."""
    return [ImageRequest(prompt=prompt, seed=5, steps=sizes.image_steps) for prompt in neutral_prompts(sizes.subjects)]


@cache
def neutral(base: Base, sizes: Sizes) -> Examples:
    """What the pristine base draws for neutral captions: its own knowledge, which a training should leave alone."""
    images = Studio.on(base, []).images(neutral_requests(sizes), progress=Silence())
    return Examples(latents=torch.stack([image.latents for image in images]), captions=neutral_prompts(sizes.subjects))


def style_prompts(style: str, subjects: int) -> tuple[str, ...]:
    """Captions of subjects that the sample set ``style`` does not show."""
    return tuple(f"{TRIGGERS[style]}, {article(subject)}" for subject in unseen_subjects()[:subjects])
