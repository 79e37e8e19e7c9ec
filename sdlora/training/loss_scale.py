"""A dynamic loss scale for float16, kept on the device: nothing here waits for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""Good steps in a row after which the scale is doubled. With the initial scale, the defaults of ``torch.amp.GradScaler``."""
LEAST_SCALE, GREATEST_SCALE = 1.0, 2.0**24
"""Beyond 2**24, the smallest gradient of float16 would reach 1; below 1, the gradients themselves overflow."""


class LossScale:
    """The factor by which a loss is multiplied so that its float16 gradients do not vanish (Micikevicius et al. 2018).

    It is halved after a step whose gradients overflow, which the optimizer skips, and doubled after ``GROWTH_INTERVAL``
    good steps in a row. Always a power of two, so that multiplying and dividing are exact.
    """

    def __init__(self, device: torch.device):
        self.value = torch.full((), INITIAL_SCALE, device=device)
        """() float32."""
        self.drops = torch.zeros((), device=device)
        """() float32: how often the scale was halved."""
        self._good = torch.zeros((), device=device)
        """() float32: good steps since the scale last changed."""

    def update(self, finite: Tensor) -> None:
        """Adapt the scale after a step; ``finite``, () bool on the device, is whether all its gradients were finite."""
        self.drops += ~finite & (self.value > LEAST_SCALE)
        good = torch.where(finite, self._good + 1, 0.0)
        grown = good >= GROWTH_INTERVAL
        factor = torch.where(grown, 2.0, torch.where(finite, 1.0, 0.5))
        self.value.mul_(factor).clamp_(LEAST_SCALE, GREATEST_SCALE)
        self._good.copy_(torch.where(grown, 0.0, good))

    def state(self) -> dict[str, Tensor]:
        """Every tensor that ``restore`` needs, by name; the live tensors."""
        return {"loss_scale": self.value, "loss_scale.good": self._good, "loss_scale.drops": self.drops}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``; what ``tensors`` lack, as after steps in another precision, stays as it is."""
        for name, tensor in self.state().items():
            if name in tensors:
                tensor.copy_(tensors[name])
