"""A layer whose change ΔW is computed from the trained tensors as a whole: LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .adapted_layer import AdaptedLayer, ComputedProduct, FrozenLayer, shape_of
from .dropout import ModuleDropout


class ComputedLayer(AdaptedLayer):
    """``base`` plus the product with ``formula`` of the leaves, in their order: ΔW in any shape of as many values.

    The two are not added before the product, which would round ΔW away in half precision.
    """

    def __init__(
        self,
        base: FrozenLayer,
        leaves: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        *,
        formula: Callable[..., Tensor],
        dropout: ModuleDropout | None = None,
    ):
        super().__init__(base, leaves, gradients)
        self._formula, self._dropout = formula, dropout

    def forward(self, x: Tensor) -> Tensor:
        """As ``base``, in its dtype."""
        shape, dropout = shape_of(self.base), self._dropout
        kept = None if dropout is None else dropout.outputs(shape[0])

        def change(*leaves: Tensor) -> Tensor:
            delta = self._formula(*leaves).reshape(shape)
            return delta if kept is None else delta * kept.to(delta.dtype).view(-1, *[1] * (len(shape) - 1))

        moved = ComputedProduct.apply(x, self.base, change, *self.leaves.values())
        return self.base(x) + (moved if dropout is None else dropout.module(moved))
