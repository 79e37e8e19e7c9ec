"""What an optimizer is to a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Algorithm(Protocol):
    """A rule that moves flat float32 parameters along their gradients, each with its own learning rate."""

    def update(self, rates: Sequence[float], finite: Tensor) -> None:
        """Apply the gradients at ``rates``, one for each parameter; change nothing where ``finite``, () bool, is false.

        A parameter without gradient stays as it is. The guard reads nothing back from the device.
        """

    def state(self) -> dict[str, Tensor]:
        """All that ``restore`` needs except the parameters, by name."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Raises ``KeyError`` or ``RuntimeError`` where the tensors do not fit."""

    def averages(self) -> list[Tensor] | None:
        """The values that are kept in place of the parameters', of their shapes; None where they are the parameters'."""
