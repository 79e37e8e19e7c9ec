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
from .session import TrainingSession

TIMESTEPS = 4
"""Noise levels at which each image is measured: the middles of this many equal parts of those that are trained."""


@torch.no_grad()
def validation_loss(session: TrainingSession, progress: Progress) -> float | None:
    """Mean loss of the validation images, measured and weighted as in training; None if there are none.

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
    total = torch.zeros((), device=base.device)
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
            total += denoising_loss(
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
        total = accelerator.reduce(total, "sum")
    return total.item() / (len(views) * TIMESTEPS)
