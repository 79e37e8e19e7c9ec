"""Where sampling starts: from noise, or part of the way from the latents of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.base import Base
from ..base.encode import Posterior
from ..data.images import as_pixels
from .request import ImageRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Latents of b images at the latent scale, (b, 4, h, w) float32, from which sampling starts part of the way."""

    mean: Tensor
    skipped: int
    """Steps at the beginning that are left out."""
    std: Tensor | None = None
    """Standard deviation of the VAE's posterior, from which latents are drawn; None where ``mean`` is exact."""
    mask: Tensor | None = None
    """(1, 1, h, w) float32: 1 is repainted, 0 stays."""

    def row(self, number: int) -> Start:
        """The start of one image."""
        rows = slice(number, number + 1)
        std = None if self.std is None else self.std[rows]
        return Start(mean=self.mean[rows], skipped=self.skipped, std=std, mask=self.mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class Beginning:
    """What the sampling loop begins with."""

    latents: Tensor
    timesteps: Tensor
    """Those of the scheduler that are taken, on the CPU."""
    after_step: Callable[[Tensor, int], Tensor] | None = None
    """Puts the unmasked part of the image back after a step, given the number of its last call of the UNet."""


def start_of(base: Base, requests: Sequence[ImageRequest], encode: Callable[[Tensor], Posterior]) -> Start | None:
    """The start of ``requests``, which share one image and one size; None where they start from noise.

    ``encode`` is a ``PixelEncoder`` of ``base``, and what it raises is raised.
    """
    first = requests[0]
    if first.start is None:
        return None
    size = first.size_on(base.checkpoint)
    pixels = as_pixels(np.asarray(first.start.scaled(size)))[None]
    posterior = encode(pixels)
    cells = first.start.cells(size, base.checkpoint.latent_factor)
    count = len(requests)
    return Start(
        mean=posterior.mean.expand(count, -1, -1, -1),
        std=posterior.std.expand(count, -1, -1, -1),
        skipped=first.steps - first.start.steps_of(first.steps),
        mask=None if cells is None else torch.from_numpy(cells)[None, None].to(base.device),
    )


def begin(
    scheduler: Any,
    generators: Sequence[torch.Generator],
    shape: tuple[int, ...],
    device: torch.device,
    start: Start | None,
) -> Beginning:
    """The first latents, and the timesteps to take, of a diffusers ``scheduler`` whose timesteps are set.

    Args:
        generators: of each image, on the CPU; drawn from as diffusers' pipelines do: first for the VAE's posterior, then for
            the noise.
        shape: of the latents of one image, (1, 4, h, w).
        device: of the latents.
    """

    def drawn() -> Tensor:
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    if start is None:
        return Beginning(latents=drawn() * scheduler.init_noise_sigma, timesteps=scheduler.timesteps)
    clean = start.mean if start.std is None else start.mean + start.std * drawn()
    noise = drawn()
    # Schedulers of the second order have each timestep but the first twice.
    first = start.skipped * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if start.mask is not None and start.skipped == 0:
        # As diffusers' inpainting pipeline: at full strength nothing is left of what was there.
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = _noised(scheduler, clean, noise, timesteps[:1])
    mask = start.mask
    if mask is None:
        return Beginning(latents=latents, timesteps=timesteps)

    def put_back(latents: Tensor, call: int) -> Tensor:
        following = timesteps[call + 1 : call + 2]
        kept = _noised(scheduler, clean, noise, following) if len(following) else clean
        return (1 - mask) * kept + mask * latents

    return Beginning(latents=latents, timesteps=timesteps, after_step=put_back)


def _noised(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """``clean`` with the noise of ``timestep``, (1,), as ``scheduler.add_noise`` mixes them.

    The two factors are computed in main memory, where the schedule is, so that nothing is copied to the device.
    """
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    signal = float(scheduler.add_noise(one, zero, timestep))
    return signal * clean + float(scheduler.add_noise(zero, one, timestep)) * noise
