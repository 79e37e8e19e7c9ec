"""A moving average of the weights over the steps, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """Decay rate at ``step`` (from 0): at most (1 + n) / (10 + n) after n steps, as in TensorFlow's moving average.

    So an average over few steps is not one of the start values.
    """
    return min(decay, (1 + step) / (10 + step))


class MovingAverage:
    """``average = decay * average + (1 - decay) * parameter`` after each step that changed something (Polyak & Juditsky
    1992, with exponential weights); float32."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self._parameters, self._decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int, finite: Tensor) -> None:
        """Take in the parameters after ``step`` (from 0); nothing changes where ``finite``, () bool, is false."""
        weight = torch.where(finite, 1 - decay_at(step, self._decay), 0.0)
        for value, parameter in zip(self.values, self._parameters, strict=True):
            value.lerp_(parameter, weight)

    def state(self) -> dict[str, Tensor]:
        """The averages by name; the live tensors."""
        return {f"average.{number}": value for number, value in enumerate(self.values)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Raises ``KeyError`` or ``RuntimeError`` where the tensors do not fit."""
        for name, value in self.state().items():
            value.copy_(tensors[name])
