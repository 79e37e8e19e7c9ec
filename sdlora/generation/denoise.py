"""From noise to latents, with classifier-free guidance. Values in, values out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Conditioning, Framing, time_ids
from ..base.encode import encode_prompts
from ..base.tokens import padded, tokenize
from ..progress import Progress, Stop, raise_if_stopped
from .prompts import parse_prompt
from .request import ImageRequest
from .samplers import SAMPLERS
from .schedulers import make_scheduler


def denoise(
    base: Base,
    requests: Sequence[ImageRequest],
    conditioning: Conditioning,
    progress: Progress,
    stop: Stop | None = None,
    before_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents, (b, 4, h/8, w/8) float32, of b requests that differ in nothing but prompts and seeds.

    ``conditioning`` is that of ``encode_requests``. ``before_step`` is called with the number of each step, from 0. A step
    reads nothing back from the device, and copies nothing to it but the new noise of samplers that draw some: the schedule
    stays in main memory, where samplers compute their factors.

    Guidance is ε = ε₀ + g (ε₁ - ε₀) (Ho & Salimans 2022, eq. 6, with g = 1 + w). Noise is drawn on the CPU, so a seed
    gives the same image on every device.

    Raises:
        Interrupted: ``stop`` was set.
    """
    first = requests[0]
    sampler = SAMPLERS[first.sampler]
    scheduler = make_scheduler(sampler, base.checkpoint.schedule, first.steps, first.schedule)
    guided = _is_guided(first)
    width, height = first.size_on(base.checkpoint)
    sizes = time_ids([Framing.whole(width, height)] * conditioning.context.shape[0]).to(base.device)
    factor = base.checkpoint.latent_factor
    shape = (1, base.unet.config["in_channels"], height // factor, width // factor)
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    latents = noise.to(base.device) * scheduler.init_noise_sigma
    extra = {**sampler.step_options, **({"generator": generators} if sampler.adds_noise else {})}
    calls, timesteps = len(scheduler.timesteps), scheduler.timesteps.to(base.device)
    for call, (timestep, on_device) in enumerate(zip(scheduler.timesteps, timesteps, strict=True)):
        raise_if_stopped(stop, "stopped while generating")
        # Samplers of second order call the UNet twice for a step, except for the last.
        step, part = divmod(call, scheduler.order)
        if before_step is not None and part == 0:
            before_step(step)
        noisy = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        predicted = base.predict(noisy, on_device, conditioning, sizes)
        if guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + first.cfg * (conditional - unconditional)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False, **extra)[0]
        if part == scheduler.order - 1 or call == calls - 1:
            progress.advance(len(requests))
    return latents


def encode_requests(base: Base, requests: Sequence[ImageRequest]) -> Conditioning:
    """A row for each prompt; with guidance, a row for each negative prompt before them."""
    negatives = [request.negative for request in requests if _is_guided(request)]
    texts = [*negatives, *(request.prompt for request in requests)]
    prompts = [tokenize(base, parse_prompt(text)) for text in texts]
    chunks = max(tokens.chunks for prompt in prompts for tokens in prompt)
    conditioning = encode_prompts(base, [padded(base, prompt, chunks) for prompt in prompts])
    if not base.checkpoint.zeros_for_empty_negative:
        return conditioning
    rows = [conditioning.row(number) for number in range(len(texts))]
    return Conditioning.stack(
        [
            row.zeros() if number < len(negatives) and not text.strip() else row
            for number, (row, text) in enumerate(zip(rows, texts, strict=True))
        ]
    )


def _is_guided(request: ImageRequest) -> bool:
    return request.cfg != 1.0
