"""From the first pass to the second: requests, and enlarged latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..base.base import Base
from ..base.checkpoint import BaseCheckpoint
from ..base.encode import Posterior
from ..data.images import as_pixels
from .hires import UPSCALERS
from .request import ImageRequest
from .start import Start


def second_pass(requests: Sequence[ImageRequest], checkpoint: BaseCheckpoint) -> list[ImageRequest]:
    """What the second pass of ``requests`` is to draw; none where they have no second pass."""
    return [
        replace(
            request,
            size=request.final_size_on(checkpoint),
            steps=request.hires.schedule_steps(request.steps),
            hires=None,
        )
        for request in requests
        if request.hires is not None
    ]


def enlarged(
    base: Base,
    requests: Sequence[ImageRequest],
    latents: Tensor,
    decode: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Posterior],
) -> Start:
    """Where the second pass of ``requests`` starts, after the first has drawn ``latents``, (b, 4, h, w) float32.

    ``decode`` is a ``LatentDecoder`` of ``base`` and ``encode`` a ``PixelEncoder``; only upscalers of pixels call them, and
    what they raise is raised.
    """
    first = requests[0]
    assert first.hires is not None
    upscaler = UPSCALERS[first.hires.upscaler]
    width, height = first.final_size_on(base.checkpoint)
    skipped = first.hires.schedule_steps(first.steps) - first.hires.steps_taken(first.steps)
    if upscaler.of_latents:
        factor = base.checkpoint.latent_factor
        size = (height // factor, width // factor)
        larger = interpolate(latents, size=size, mode=upscaler.mode, antialias=upscaler.antialias)
        return Start(mean=larger, skipped=skipped)
    method = Image.Resampling[upscaler.mode]
    posteriors = []
    for pixels in as_arrays(decode(latents)):
        image = Image.fromarray(pixels).resize((width, height), method)
        # One by one: encoding needs more memory than denoising.
        posteriors.append(encode(as_pixels(np.asarray(image))[None]))
    mean = torch.cat([posterior.mean for posterior in posteriors])
    return Start(mean=mean, std=torch.cat([posterior.std for posterior in posteriors]), skipped=skipped)


def as_arrays(pixels: Tensor) -> np.ndarray:
    """Pixels (b, 3, h, w) in [0, 1] -> uint8 (b, h, w, 3), rounded."""
    return pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
