"""What a LoRA file does to one module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor


class Change(ABC):
    """A change ΔW of the pristine weight W of a module, of one of the kinds that LoRA files know.

    ``delta`` is told the pristine weight, never one that another LoRA has changed already. So the order of stacked LoRAs
    does not matter, also for the kinds that depend on W. A strength multiplies ΔW.
    """

    if TYPE_CHECKING:
        # Fields of some kinds and properties of others.
        @property
        def kind(self) -> str:
            """``lora``, ``loha`` … as people call it."""

        @property
        def rank(self) -> int | None:
            """None for kinds that have none."""

        @property
        def alpha(self) -> float | None:
            """As the file has it; None for kinds that have none."""

        @property
        def weight_shape(self) -> tuple[int, ...] | None:
            """Shape of the weight that this changes; None where only the weight knows."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """ΔW in the shape and dtype of ``weight``, which is float32 or float64."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by its name in kohya's and LyCORIS' files, ``alpha`` not among them."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of ``shape`` can be changed by it.

        A linear change fits a 1 x 1 convolution and the other way round: SD 1.x and 2.x differ in that alone.
        """
        bias, own = self.bias_delta(), self.weight_shape
        if bias is not None and bias.numel() != shape[0]:
            return False
        if own is not None:
            return own == shape or (own[:2] == shape[:2] and set(own[2:] + shape[2:]) <= {1})
        try:
            return tuple(self.delta(torch.empty(shape, device="meta")).shape) == shape
        except (RuntimeError, ValueError, IndexError):
            return False

    def bias_delta(self) -> Tensor | None:
        """Change of the bias, (out,), where there is one."""
        return None

    def norm(self) -> float | None:
        """Frobenius norm of ΔW; None where it depends on W."""
        return None
