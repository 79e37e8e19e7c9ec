"""When something happens that happens every few steps or epochs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The steps after which something is due: multiples of ``steps``, and of ``epochs``; 0 is never."""

    steps: int
    epochs: int
    batches_per_epoch: int

    def __bool__(self) -> bool:
        """Whether there can be any."""
        return bool(self.steps or self.epochs)

    def due(self, done: int) -> bool:
        """Whether it is due after ``done`` steps."""
        periods = (self.steps, self.epochs * self.batches_per_epoch)
        return done > 0 and any(period and done % period == 0 for period in periods)
