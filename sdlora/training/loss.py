"""Prediction target, weighting and loss, side by side."""

from __future__ import annotations

from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Conditioning
from ..config.sections import ObjectiveSection
from .objective import level_weights, penalties


def denoising_loss(
    base: Base,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Tensor,
    *,
    objective: ObjectiveSection,
    input_noise: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """Loss of each image, (b,) float32: weighted mean error of the base's prediction, as ``objective`` measures errors.

    ``latents`` and ``noise`` are (b, 4, h, w) float32, ``timesteps`` (b,) int64; ``conditioning`` and ``time_ids`` (see
    ``Base.predict``) have a row for each. ``input_noise`` takes the place of ``noise`` in what the base sees. ``masks``,
    (b, 1, h, w) float32 in [0, 1], are multiplied into the errors before the mean over all of them, as in kohya's trainer:
    masking half of an image halves its loss.
    """
    schedule = base.schedule
    noisy = schedule.add_noise(latents, noise if input_noise is None else input_noise, timesteps)
    predicted = base.predict(noisy, timesteps, conditioning, time_ids)
    errors = penalties(predicted - schedule.target(latents, noise, timesteps), timesteps, schedule, objective)
    if masks is not None:
        errors = errors * masks
    return errors.mean(dim=(1, 2, 3)) * level_weights(timesteps, schedule, objective)
