"""Prediction target, weighting and loss, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..base.encode import Conditioning, Framing, added_conditions
from ..base.load import Base


def denoising_loss(
    base: Base,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    framings: Sequence[Framing],
    *,
    min_snr_gamma: float,
    masks: Tensor | None = None,
) -> Tensor:
    """Loss of each image, (b,) float32: min-SNR weighted mean squared error of the base's prediction.

    ``latents`` and ``noise`` are (b, 4, h, w) float32, ``timesteps`` (b,) int64; ``conditioning`` and
    ``framings`` have a row for each. ``masks``, (b, 1, h, w) float32 in [0, 1], are multiplied into the squared errors
    before the mean over all of them, as in kohya's trainer: an image of which half counts has half the say.
    """
    schedule = base.schedule
    noisy = schedule.add_noise(latents, noise, timesteps).to(base.dtype)
    added = added_conditions(base, conditioning, framings)
    predicted = base.unet(noisy, timesteps, conditioning.context, added_cond_kwargs=added, return_dict=False)[0].float()
    errors = (predicted - schedule.target(latents, noise, timesteps)).square()
    if masks is not None:
        errors = errors * masks
    return errors.mean(dim=(1, 2, 3)) * schedule.min_snr_weight(timesteps, min_snr_gamma)
