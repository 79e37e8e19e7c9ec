"""How well the base with its LoRA knows pictures that it was never trained on."""

from __future__ import annotations

import numpy as np
import torch

from ..data.batches import share
from ..progress import Progress
from .loss import denoising_loss
from .session import TrainingSession

TIMESTEPS = 4
"""Noise levels at which each picture is measured: the middles of as many equal parts of the schedule."""
_STREAM = 20
"""Of random numbers; those of ``batches``, ``views`` and ``captions`` are below."""


@torch.no_grad()
def validation_loss(session: TrainingSession, progress: Progress) -> float | None:
    """Mean loss of the validation pictures, weighted as in training; None where there are none.

    Noise depends on the seed, the picture and the noise level alone, and the latent is the encoder's mean: the same in
    every measurement, so that what differs is what was learned. Every process computes its share of the pictures.
    """
    plan, base = session.plan, session.base
    views, accelerator = plan.training.validation, session.accelerator
    if not views:
        return None
    levels = len(base.schedule.alphas_cumprod)
    timesteps = [(2 * k + 1) * levels // (2 * TIMESTEPS) for k in range(TIMESTEPS)]
    total = torch.zeros((), device=base.device)
    own = share(len(views), process=accelerator.process_index, processes=accelerator.num_processes)
    progress.start("Validation", len(own))
    for number in own:
        view = views[number]
        picture, source = session.pictures[view], plan.training.items[view.item].source
        conditioning = session.contexts.of([source.rules.plain(source.captions)])
        for timestep in timesteps:
            rng = np.random.default_rng([plan.config.train.seed, _STREAM, timestep, view.item])
            noise = rng.standard_normal(tuple(picture.mean.shape), dtype=np.float32)
            total += denoising_loss(
                base,
                session.stacked([picture.mean]),
                session.on_device([noise]),
                torch.tensor([timestep], device=base.device),
                conditioning,
                [picture.framing],
                min_snr_gamma=plan.config.train.min_snr_gamma,
                masks=session.masks([picture]),
            )[0]
        progress.advance()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
    return total.item() / (len(views) * TIMESTEPS)
