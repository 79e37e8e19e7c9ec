"""Whether a run learned: its LoRA against the base alone, on the images that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..base.conditioning import time_ids
from ..progress import Progress
from ..randomness import Stream, generator
from .loss import denoising_loss
from .objective import level_weights, trained_levels
from .session import TrainingSession

LEAST_STEPS = 50
"""Steps of a run that is judged, at least: fewer say nothing of its settings, and the comparison would take long."""
COMPARED = 8
"""Number of images that are compared, each at a noise level of its own."""
LEAST_GAIN = 0.001
"""Share of the loss that a run that learned anything takes away. Usual settings take 1 % and more in 50 steps."""
WORSE_THAN_NOTHING = 1.5
"""Times the loss of predicting zero that a base has, at high noise, if its kind of prediction is the wrong one."""
RATE_TOO_HIGH = "optimizer.learning_rate is probably too high; lower it and start over with --restart"


def tail_length(steps: int) -> int:
    """Steps at the end of a run that its loss is averaged over: 10 %."""
    return max(1, steps // 10)


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnLosses:
    """Losses on the training images, one for each of evenly spaced noise levels, from low to high."""

    losses: np.ndarray
    """(n,) float64; the same noise in every measurement of a run, so that a difference is what was learned."""
    of_zero: np.ndarray
    """(n,) float64: about the loss of a model that predicts zero."""


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
    objective = plan.config.objective.model_copy(update={"loss": "l2"})
    levels = trained_levels(objective, len(base.schedule.alphas_cumprod))
    measured = []
    progress.start("Comparing with the base", len(samples))
    for position, sample in enumerate(samples):
        timestep = levels[(2 * position + 1) * len(levels) // (2 * len(samples))]
        image = session.images[sample.view]
        rng = generator(plan.config.train.seed, Stream.COMPARISON_NOISE, position)
        timesteps = torch.tensor([timestep], device=base.device)
        loss = denoising_loss(
            base,
            image.mean[None].to(base.device),
            torch.from_numpy(rng.standard_normal((1, *image.mean.shape), dtype=np.float32)).to(base.device),
            timesteps,
            session.embeddings.encode([sample.caption]),
            time_ids([image.framing]).to(base.device),
            objective=objective,
        )
        measured.append(torch.cat([loss, level_weights(timesteps, base.schedule, objective)]))
        progress.advance()
    losses, of_zero = torch.stack(measured).cpu().double().numpy().T
    return OwnLosses(losses=losses, of_zero=of_zero)


def run_warning(*, trained: OwnLosses, alone: OwnLosses) -> str | None:
    """A sentence on a run that learned nothing or diverged; None where all is well.

    Args:
        trained: with the LoRA.
        alone: of the base without it, on the same images and noise.
    """
    cause = RATE_TOO_HIGH
    if not np.isfinite(trained.losses).all():
        return f"the loss was NaN or Inf at the end: {cause}"
    highest = slice(-max(1, len(alone.losses) // 4), None)
    if alone.losses[highest].sum() > WORSE_THAN_NOTHING * alone.of_zero[highest].sum():
        return (
            "at high noise the base without the LoRA is worse than predicting nothing: base.prediction is probably wrong; "
            "correct it and start over with --restart"
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
