"""What a LoRA file does to one module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor


class Change(ABC):
    """A change ΔW of the pristine weight W of a module, of one of the kinds that LoRA files know.

    ``delta`` gets the pristine weight, never one that another LoRA has changed already. So the order of stacked LoRAs
    does not matter, also for the kinds that depend on W. A strength multiplies ΔW.
    """

    if TYPE_CHECKING:
        # Fields of some kinds and properties of others.
        @property
        def kind(self) -> str:
            """Name of the kind: ``lora``, ``loha`` …"""

        @property
        def rank(self) -> int | None:
            """None for kinds that have none."""

        @property
        def alpha(self) -> float | None:
            """The alpha of the file; None for kinds that have none."""

        @property
        def weight_shape(self) -> tuple[int, ...] | None:
            """Shape of the weight that this changes; None where only the weight shows it."""

    reads_weight: ClassVar[bool] = True
    """Whether ΔW depends on the values of W, and not on its shape alone."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """ΔW in the shape and dtype of ``weight``, which is float32 or float64."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by its name in kohya's and LyCORIS' files, ``alpha`` not among them."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a module whose weight has ``shape`` can be changed by it.

        A linear change fits a 1 x 1 convolution and the other way round: SD 1.x and 2.x differ in that alone.
        """
        bias = self.bias_delta()
        return (bias is None or bias.numel() == shape[0]) and self._fits_weight(shape)

    def _fits_weight(self, shape: tuple[int, ...]) -> bool:
        """Kinds whose ``weight_shape`` is None override it."""
        known = self.weight_shape
        return known is not None and (known == shape or (known[:2] == shape[:2] and set(known[2:] + shape[2:]) <= {1}))

    def bias_delta(self) -> Tensor | None:
        """Change of the bias, (out,), where there is one."""
        return None

    def norm(self) -> float | None:
        """Frobenius norm of ΔW; None where it depends on W."""
        return None
