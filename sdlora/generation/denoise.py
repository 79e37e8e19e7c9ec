"""From noise to latents, with classifier-free guidance. Values in, values out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Framing, time_ids
from ..progress import Progress, Stop, raise_if_stopped
from .preview import Watch
from .request import ImageRequest
from .samplers import SAMPLERS
from .scheduled_prompt import ScheduledConditioning
from .schedulers import make_scheduler
from .start import Start, begin


def denoise(
    base: Base,
    requests: Sequence[ImageRequest],
    conditioning: ScheduledConditioning,
    progress: Progress,
    stop: Stop | None = None,
    before_step: Callable[[int], None] | None = None,
    start: Start | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Latents, (b, 4, h/8, w/8) float32, of b requests that differ in nothing but prompts and seeds.

    ``conditioning`` is that of ``encode_requests``, ``start`` that of ``start_of``. ``before_step`` is called with the
    number of each step, from 0, and ``watch`` after each prediction. Without it, a step reads nothing back from the device,
    and copies nothing to it but the new noise of samplers that draw some: the schedule stays in main memory, where samplers
    compute their factors.

    Guidance is ε = ε₀ + g (ε₁ - ε₀) (Ho & Salimans 2022, eq. 6, with g = 1 + w). Noise is drawn on the CPU, so a seed
    gives the same image on every device.

    Raises:
        Interrupted: ``stop`` was set.
    """
    first = requests[0]
    sampler = SAMPLERS[first.sampler]
    facts, family = base.checkpoint.schedule, base.checkpoint.family.name
    scheduler = make_scheduler(sampler, facts, first.steps, first.schedule, family=family)
    width, height = first.size_on(base.checkpoint)
    sizes = time_ids([Framing.whole(width, height)] * conditioning.batch_size).to(base.device)
    factor = base.checkpoint.latent_factor
    shape = (1, base.unet.config["in_channels"], height // factor, width // factor)
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    beginning = begin(scheduler, generators, shape, base.device, start)
    latents = beginning.latents
    extra = {**sampler.step_options, **({"generator": generators} if sampler.adds_noise else {})}
    timesteps, on_device = beginning.timesteps, beginning.timesteps.to(base.device)
    for call, timestep in enumerate(timesteps):
        raise_if_stopped(stop, "stopped while generating")
        step, part = divmod(call, scheduler.order)
        if before_step is not None and part == 0:
            before_step(step)
        noisy = scheduler.scale_model_input(conditioning.repeated(latents), timestep)
        predicted = base.predict(noisy, on_device[call], conditioning.at(step), sizes)
        if conditioning.guided:
            unconditional, conditional = conditioning.split(predicted)
            predicted = unconditional + first.cfg * (conditional - unconditional)
            if first.guidance_rescale:
                predicted = _rescaled(predicted, conditional, first.guidance_rescale)
        if watch is not None:
            watch(noisy[: len(requests)], predicted, timestep)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False, **extra)[0]
        # Samplers of second order call the UNet twice for a step, except for the last.
        if part == scheduler.order - 1 or call == len(timesteps) - 1:
            if beginning.after_step is not None:
                latents = beginning.after_step(latents, call)
            progress.advance(len(requests))
    return latents


def _rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """``guided`` with, in ``share`` of it, the standard deviation of ``conditional``, of each image (b, 4, h, w).

    φ x σ₊ / σ + (1 - φ) x (Lin et al. 2024, eq. 15 and 16).
    """
    factor = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    return guided * (share * factor + 1 - share)
