"""How long a stage trains: a number of steps, or less where a time limit comes first."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Learning rates follow ``share``, so a stage that runs out of time still comes to its end in good order."""

    steps: int
    seconds: float = float("inf")
    spent: float = 0.0
    """Seconds before an interruption."""
    _began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return self.spent + time.monotonic() - self._began

    def share(self, step: int) -> float:
        """Of the stage, in [0, 1]; 1 is its end."""
        return min(1.0, max(step / self.steps, self.elapsed / self.seconds))


def cosine_rate(share: float, step: int, peak: float, warmup: int) -> float:
    """Linear warm-up over ``warmup`` steps, then a cosine to 1 % of the peak."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def late_descent_rate(share: float, step: int, peak: float, warmup: int, *, decay: float = 0.3) -> float:
    """Linear warm-up, constant, and a linear descent to 1 % over the last ``decay`` of the stage."""
    return peak * min(1.0, (step + 1) / warmup) * max(0.01, min(1.0, (1 - share) / decay))
