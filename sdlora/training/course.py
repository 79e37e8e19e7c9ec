"""Whether the losses of a run say that it learned: a warning where they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEAST_STEPS = 10
"""Steps that a mean is taken over, at least. Losses depend on the timesteps that are drawn, so fewer say little."""
MARGIN = 4.0
"""Standard errors by which the mean at the end must be above that at the start: noise alone hardly reaches it."""
WORSE = 1.5
"""Times the loss of predicting nothing that a run ends above, to be called worse: an untrained base lies near 1."""


def tail_length(steps: int) -> int:
    """Steps at either end of a run that its losses are averaged over: 10 %."""
    return max(1, steps // 10)


def loss_warning(losses: Sequence[float], *, first: int, steps: int, unlearned: float) -> str | None:
    """A sentence on a run whose loss rose, or ended far above ``unlearned``; None where all is well or too little is known.

    Args:
        losses: one for each step from ``first`` (0 unless the run was resumed) to the last.
        steps: steps of the whole run.
        unlearned: mean loss of a model that always predicts zero.
    """
    length = tail_length(steps)
    if length < LEAST_STEPS or len(losses) < length:
        return None
    end = np.asarray(losses[-length:], np.float64)
    cause = "optimizer.learning_rate is probably too high; lower it and start over with --restart"
    if not np.isfinite(end).all():
        return f"the loss was NaN or Inf at the end: {cause}"
    if end.mean() > WORSE * unlearned:
        return (
            f"the loss ended at {end.mean():.4f}, worse than predicting nothing ({unlearned:.4f}): "
            "optimizer.learning_rate is probably too high, or base.prediction is wrong; correct it and start over "
            "with --restart"
        )
    if first or len(losses) < 2 * length:
        return None
    start = np.asarray(losses[:length], np.float64)
    error = math.sqrt((start.var(ddof=1) + end.var(ddof=1)) / length)
    if end.mean() > start.mean() + MARGIN * error:
        return f"the loss rose from {start.mean():.4f} at the start to {end.mean():.4f} at the end: {cause}"
    return None
