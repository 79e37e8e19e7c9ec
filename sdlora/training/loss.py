"""Prediction target, weighting and loss, side by side."""

from __future__ import annotations

from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Conditioning


def denoising_loss(
    base: Base,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Tensor,
    *,
    min_snr_gamma: float,
    masks: Tensor | None = None,
) -> Tensor:
    """Loss of each image, (b,) float32: min-SNR weighted mean squared error of the base's prediction.

    ``latents`` and ``noise`` are (b, 4, h, w) float32, ``timesteps`` (b,) int64; ``conditioning`` and ``time_ids`` (see
    ``Base.predict``) have a row for each. ``masks``, (b, 1, h, w) float32 in [0, 1], are multiplied into the squared errors
    before the mean over all of them, as in kohya's trainer: masking half of an image halves its loss.
    """
    schedule = base.schedule
    noisy = schedule.add_noise(latents, noise, timesteps)
    predicted = base.predict(noisy, timesteps, conditioning, time_ids)
    errors = (predicted - schedule.target(latents, noise, timesteps)).square()
    if masks is not None:
        errors = errors * masks
    return errors.mean(dim=(1, 2, 3)) * schedule.min_snr_weight(timesteps, min_snr_gamma)
