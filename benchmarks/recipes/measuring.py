"""What is measured of a trained model: losses at fixed noise, the style and the subject of its images, forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.mini.fidelity import Gallery, load_sheet
from sdlora.base.base import Base
from sdlora.base.conditioning import Framing, time_ids
from sdlora.base.encode import encode_prompts
from sdlora.base.tokens import plain, tokenize
from sdlora.generation.request import ImageRequest
from sdlora.generation.studio import Studio
from sdlora.lora.stack import temporarily_applied
from sdlora.progress import Silence
from tests.conftest import ROOT
from tests.measures import MEASURES, THRESHOLDS, unseen_subjects

from .samples import Examples, Sizes, neutral, neutral_requests, style_prompts

LEVELS = 8
"""Noise levels of a loss: the middles of this many equal parts of the schedule."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A base, its weights perhaps changed, and the LoRA files to put on it."""

    base: Base
    files: tuple[str, ...] = ()
    """Each ``FILE:WEIGHT``."""

    @property
    def studio(self) -> Studio:
        """With the files."""
        return Studio.on(self.base, list(self.files))


@torch.no_grad()
def level_losses(trained: Trained, examples: Examples) -> list[float]:
    """Mean squared error of the prediction at each of ``LEVELS`` levels; the noise is always the same."""
    base, count = trained.base, len(examples.captions)
    levels = len(base.schedule.alphas_cumprod)
    sizes = time_ids([Framing.whole(base.checkpoint.resolution, base.checkpoint.resolution)] * count)
    losses = []
    with temporarily_applied(base.modules(), [lora.changes() for lora in trained.studio.loras]):
        conditioning = encode_prompts(base, [tokenize(base, plain(caption)) for caption in examples.captions])
        for number in range(LEVELS):
            timestep = torch.full((count,), (2 * number + 1) * levels // (2 * LEVELS))
            rng = np.random.default_rng([7, number])
            noise = torch.from_numpy(rng.standard_normal(tuple(examples.latents.shape), dtype=np.float32))
            noisy = base.schedule.add_noise(examples.latents, noise, timestep)
            predicted = base.predict(noisy, timestep, conditioning, sizes)
            target = base.schedule.target(examples.latents, noise, timestep)
            losses.append((predicted - target).square().mean().item())
    return losses


@cache
def _gallery() -> Gallery:
    references = ROOT / "tests" / "references"
    # By shapes alone: colours are what a style replaces.
    return load_sheet(references / "base.png", (references / "subjects.txt").read_text().splitlines(), colour=False)


def subject_kept(images: Sequence[Image.Image]) -> float:
    """Share of images whose nearest reference shows the subject; there is one image of each."""
    return _gallery().fidelity(images, unseen_subjects()[: len(images)])


def style_measures(trained: Trained, style: str, seed: int, sizes: Sizes) -> dict[str, float]:
    """Of images at weight 1.0: the style's measure, the share on its side of the threshold, and the subjects."""
    requests = [
        ImageRequest(prompt=prompt, seed=11 + seed, steps=sizes.image_steps)
        for prompt in style_prompts(style, sizes.subjects)
    ]
    images = [image.image for image in trained.studio.images(requests, progress=Silence())]
    values = np.array([MEASURES[style](image) for image in images])
    return {
        "style": float(values.mean()),
        "style shown": float((values > THRESHOLDS[style]).mean()),
        "subject kept": subject_kept(images),
    }


def neutral_measures(trained: Trained, pristine: Base, style: str, sizes: Sizes, sheet: Path) -> dict[str, float]:
    """Of images of neutral captions, written to ``sheet``: the distance of their latents from those that ``pristine``
    draws with the same seeds, over the size of these; their subjects; and what of the style leaked in."""
    drawn = trained.studio.images(neutral_requests(sizes), progress=Silence())
    images = [image.image for image in drawn]
    wide = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for number, image in enumerate(images):
        wide.paste(image, (number * image.width, 0))
    sheet.parent.mkdir(parents=True, exist_ok=True)
    wide.save(sheet)
    own = neutral(pristine, sizes).latents
    moved = torch.stack([image.latents for image in drawn]) - own
    return {
        "neutral moved": (moved.norm() / own.norm()).item(),
        "neutral subject kept": subject_kept(images),
        "neutral style": float(np.mean([MEASURES[style](image) for image in images])),
    }


def neutral_losses(trained: Trained, pristine: Base, sizes: Sizes) -> list[float]:
    """``level_losses`` on what ``pristine`` draws for neutral captions."""
    return level_losses(trained, neutral(pristine, sizes))
