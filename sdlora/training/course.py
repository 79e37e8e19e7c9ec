"""Whether a run learned: its LoRA against the base alone, on the images that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..base.conditioning import time_ids
from ..progress import Progress
from ..randomness import Stream, generator
from .objective import level_weights, trained_levels
from .session import TrainingSession

LEAST_STEPS = 50
"""Steps of a run that is judged, at least: fewer say nothing of its settings, and the comparison would take long."""
COMPARED = 8
"""Number of images that are compared, each at a noise level of its own."""
LEAST_GAIN = 0.001
"""Share of the loss that a run that learned anything takes away. Usual settings take 1 % and more in 50 steps."""
FITS_OTHER = 0.7
"""If the stated kind of prediction is wrong, the other leaves at most this share of what it leaves unexplained."""
RATE_TOO_HIGH = "optimizer.learning_rate is probably too high; lower it and start over with --restart"


def tail_length(steps: int) -> int:
    """Steps at the end of a run that its loss is averaged over: 10 %."""
    return max(1, steps // 10)


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnLosses:
    """Losses on the training images, one for each of evenly spaced noise levels, from low to high."""

    losses: np.ndarray
    """(n,) float64; the same noise in every measurement of a run, so that a difference is what was learned."""
    unexplained: np.ndarray
    """(n, 2) float64: error over the energy of what is to be predicted, 1 for a model that predicts zero. The second column
    takes the same predictions as v instead of ε, or as ε instead of anything else."""


@torch.no_grad()
def own_losses(session: TrainingSession, progress: Progress) -> OwnLosses | None:
    """Losses on the images of the last steps, with the layers that are attached now; None for runs too short to judge.

    They are squared errors whatever ``objective.loss`` says, weighted as in training: of those it is known what is usual.
    """
    plan, base = session.plan, session.base
    training, steps = plan.training, plan.steps
    if steps < LEAST_STEPS:
        return None
    shown = (sample for step in reversed(range(steps)) for sample in training.batch(step))
    own = (sample for sample in shown if training.items[sample.view.item].source.role == "train")
    samples = [sample for sample, _ in zip(own, range(COMPARED), strict=False)]
    objective = plan.config.objective
    other = replace(base.schedule, prediction="v_prediction" if base.schedule.prediction == "epsilon" else "epsilon")
    levels = trained_levels(objective, len(base.schedule.alphas_cumprod))
    measured = []
    progress.start("Comparing with the base", len(samples))
    for position, sample in enumerate(samples):
        timestep = levels[(2 * position + 1) * len(levels) // (2 * len(samples))]
        image = session.images[sample.view]
        rng = generator(plan.config.train.seed, Stream.COMPARISON_NOISE, position)
        timesteps = torch.tensor([timestep], device=base.device)
        latents = image.mean[None].to(base.device)
        noise = torch.from_numpy(rng.standard_normal((1, *image.mean.shape), dtype=np.float32)).to(base.device)
        predicted = base.predict(
            base.schedule.add_noise(latents, noise, timesteps),
            timesteps,
            session.embeddings.encode([sample.caption]),
            time_ids([image.framing]).to(base.device),
        )
        targets = torch.cat([schedule.target(latents, noise, timesteps) for schedule in (base.schedule, other)])
        errors = (predicted - targets).square().mean(dim=(1, 2, 3))
        loss = errors[:1] * level_weights(timesteps, base.schedule, objective)
        measured.append(torch.cat([loss, errors / targets.square().mean(dim=(1, 2, 3))]))
        progress.advance()
    table = torch.stack(measured).cpu().double().numpy()
    return OwnLosses(losses=table[:, 0], unexplained=table[:, 1:])


def run_warning(*, trained: OwnLosses, alone: OwnLosses) -> str | None:
    """A sentence on a run that learned nothing or diverged; None where all is well.

    Args:
        trained: with the LoRA.
        alone: of the base without it, on the same images and noise.
    """
    cause = RATE_TOO_HIGH
    if not np.isfinite(trained.losses).all():
        return f"the loss was NaN or Inf at the end: {cause}"
    count = len(alone.losses)
    stated, other = alone.unexplained[count // 4 : count - count // 4].mean(axis=0)
    if other < FITS_OTHER * stated:
        return (
            "what the base predicts, without the LoRA, fits another kind of prediction better: base.prediction is probably "
            "wrong; correct it and start over with --restart"
        )
    ratio = np.exp(np.log(np.maximum(trained.losses, 1e-12) / np.maximum(alone.losses, 1e-12)).mean())
    means = (
        f"the loss on its training images is {trained.losses.mean():.4f} with it, {alone.losses.mean():.4f} without it"
    )
    if ratio > 1 + LEAST_GAIN:
        return f"the LoRA makes the base worse ({means}): {cause}"
    if ratio > 1 - LEAST_GAIN:
        return (
            f"the LoRA learned almost nothing ({means}): optimizer.learning_rate is probably too low; raise it and start "
            "over with --restart"
        )
    return None
