"""Prompt -> noise -> latents -> image, with classifier-free guidance. Values in, values out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Conditioning, Framing
from ..base.encode import decode_latents, encode_prompts
from ..base.schedule import ScheduleFacts
from ..base.tokens import padded, tokenize
from ..formats.hashes import file_hashes
from ..lora.merging import temporarily_merged
from ..progress import Progress
from .infotext import UsedLora, infotext
from .loras import FittedLora, LoraChoice
from .prompts import parse_prompt

_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
}

IMAGES_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image. ``width`` and ``height`` in pixels are multiples of the base's ``size_step``."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    sampler: str


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedImage:
    """``latents`` are (4, h/8, w/8) float32 at the latent scale; ``parameters`` is the recipe in A1111's form."""

    image: Image.Image
    latents: Tensor
    parameters: str
    request: ImageRequest


def generate_images(
    base: Base,
    requests: Sequence[ImageRequest],
    loras: Sequence[tuple[FittedLora, LoraChoice]],
    progress: Progress,
) -> list[GeneratedImage]:
    """Generate every request under the same LoRAs, which are merged for as long as this takes."""
    if not requests:
        return []
    own_skip = base.checkpoint.clip_skip if base.checkpoint.clip_skip != base.checkpoint.family.clip_skip else None
    facts = [
        UsedLora(name=choice.name, unet=choice.unet, text_encoder=choice.text_encoder, autov3=fitted.autov3)
        for fitted, choice in loras
    ]
    file = base.checkpoint.file
    autov2 = file_hashes(file, progress).autov2 if file else None
    images = []
    progress.start("Generating", sum(r.steps for r in requests))
    with torch.no_grad(), temporarily_merged(base.modules(), [fitted.weighted(choice) for fitted, choice in loras]):
        for group in _groups(requests):
            latents = denoise(base, group, progress)
            pixels = decode_latents(base, latents).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            for request, latent, array in zip(group, latents, pixels, strict=True):
                images.append(
                    GeneratedImage(
                        image=Image.fromarray(array),
                        latents=latent.float().cpu(),
                        parameters=infotext(
                            request,
                            base_name=base.checkpoint.name,
                            base_autov2=autov2,
                            loras=facts,
                            clip_skip=own_skip,
                        ),
                        request=request,
                    )
                )
    return images


def denoise(base: Base, requests: Sequence[ImageRequest], progress: Progress) -> Tensor:
    """(b, 4, h/8, w/8) float32 for ``requests`` that agree in everything but prompts and seeds.

    Guidance is ε = ε₀ + g (ε₁ - ε₀) (Ho & Salimans 2022, eq. 6, with g = 1 + w); noise is drawn on the CPU, so a seed means
    the same image on every device.
    """
    first = requests[0]
    scheduler = make_scheduler(base.checkpoint.schedule, first.sampler)
    scheduler.set_timesteps(first.steps, device=base.device)
    guided = first.guidance != 1.0
    conditioning = _conditioning(base, requests, guided=guided)
    framings = [Framing.whole(first.width, first.height)] * conditioning.context.shape[0]
    factor = base.checkpoint.latent_factor
    shape = (1, base.unet.config["in_channels"], first.height // factor, first.width // factor)
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    latents = noise.to(base.device) * scheduler.init_noise_sigma
    extra = {"generator": generators} if first.sampler == "euler-a" else {}
    for timestep in scheduler.timesteps:
        doubled = torch.cat([latents] * 2) if guided else latents
        predicted = base.predict(scheduler.scale_model_input(doubled, timestep), timestep, conditioning, framings)
        if guided:
            without, with_prompt = predicted.chunk(2)
            predicted = without + first.guidance * (with_prompt - without)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False, **extra)[0]
        progress.advance(len(requests))
    return latents


def _conditioning(base: Base, requests: Sequence[ImageRequest], *, guided: bool) -> Conditioning:
    """Of the prompts; where ``guided``, of the negative ones before them."""
    texts = [request.negative for request in requests if guided] + [request.prompt for request in requests]
    tokens = [tokenize(base, parse_prompt(text)) for text in texts]
    chunks = max(own.chunks for prompt in tokens for own in prompt)
    conditioning = encode_prompts(base, [padded(base, prompt, chunks) for prompt in tokens])
    if not base.checkpoint.zeros_for_empty_negative:
        return conditioning
    negatives = len(texts) - len(requests)
    rows = [conditioning.row(number) for number in range(len(texts))]
    empty = [number < negatives and not text.strip() for number, text in enumerate(texts)]
    return Conditioning.stack([row.zeros() if blank else row for row, blank in zip(rows, empty, strict=True)])


def make_scheduler(schedule: ScheduleFacts, sampler: str) -> Any:
    """A fresh scheduler of the named kind over the base's own noise schedule."""
    kind, options = _SCHEDULERS[sampler]
    own: dict[str, Any] = {
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "num_train_timesteps": schedule.timesteps,
        "prediction_type": schedule.prediction,
        "steps_offset": schedule.steps_offset,
    }
    if schedule.zero_terminal_snr:
        # Only trailing steps begin at the last timestep, where all is noise (Lin et al. 2024, section 3.3).
        own |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif schedule.timestep_spacing is not None:
        own["timestep_spacing"] = schedule.timestep_spacing
    return kind(**own, **options)


def _groups(requests: Sequence[ImageRequest]) -> list[list[ImageRequest]]:
    groups: list[list[ImageRequest]] = []
    for request in requests:
        last = groups[-1] if groups else None
        same = last and replace(last[0], prompt="", negative="", seed=0) == replace(
            request, prompt="", negative="", seed=0
        )
        if last and same and len(last) < IMAGES_AT_ONCE:
            last.append(request)
        else:
            groups.append([request])
    return groups
