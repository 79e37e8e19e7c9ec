"""The loss on images that are not trained on."""

from __future__ import annotations

import numpy as np
import torch

from ..base.conditioning import time_ids
from ..progress import Progress
from ..randomness import Stream, generator
from .batches import share
from .loss import denoising_loss
from .objective import trained_levels
from .processes import add_up
from .session import TrainingSession

TIMESTEPS = 4
"""Noise levels at which each image is measured: the middles of this many equal parts of those that are trained."""


def validation_loss(session: TrainingSession, progress: Progress) -> float | None:
    """Mean of the ``validation_losses``; None if there are no validation images."""
    losses = validation_losses(session, progress)
    return None if losses is None else mean_loss(losses)


def mean_loss(losses: np.ndarray) -> float:
    """Mean of ``losses``, float32, added up in their order and in their precision."""
    return float(np.add.accumulate(losses.ravel())[-1]) / losses.size


@torch.no_grad()
def validation_losses(session: TrainingSession, progress: Progress) -> np.ndarray | None:
    """Losses of the validation images, (images, noise levels) float32, measured and weighted as in training.

    None if there are no such images.

    Noise depends only on the seed, the image and the noise level, without what ``[objective]`` adds to it in training,
    and the latent is the encoder's mean. They are the same in every measurement, so a difference shows what was learned.
    Every process computes its share of the images.
    """
    plan, base = session.plan, session.base
    views, accelerator = plan.training.validation, session.accelerator
    if not views:
        return None
    levels = trained_levels(plan.config.objective, len(base.schedule.alphas_cumprod))
    timesteps = [levels[(2 * k + 1) * len(levels) // (2 * TIMESTEPS)] for k in range(TIMESTEPS)]
    on_device = torch.tensor(timesteps, device=base.device)
    losses = torch.zeros(len(views), TIMESTEPS, device=base.device)
    numbers = share(len(views), process=accelerator.process_index, processes=accelerator.num_processes)
    progress.start("Validation", len(numbers))
    for number in numbers:
        view = views[number]
        image, source = session.images[view], plan.training.items[view.item].source
        conditioning = session.embeddings.encode([source.rules.plain(source.captions)])
        mean, sizes = image.mean[None].to(base.device), time_ids([image.framing]).to(base.device)
        masks = None if image.mask is None else image.mask[None].to(base.device)
        for level, timestep in enumerate(timesteps):
            rng = generator(plan.config.train.seed, Stream.VALIDATION_NOISE, timestep, view.item)
            noise = rng.standard_normal(tuple(image.mean.shape), dtype=np.float32)
            losses[number, level] = denoising_loss(
                base,
                mean,
                torch.from_numpy(noise)[None].to(base.device),
                on_device[level, None],
                conditioning,
                sizes,
                objective=plan.config.objective,
                masks=masks,
            )[0]
        progress.advance()
    if accelerator.num_processes > 1:
        add_up(losses)
    return losses.cpu().numpy()
