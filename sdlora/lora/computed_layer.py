"""A layer whose change ΔW is computed from the trained tensors as a whole: LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .adapted_layer import AdaptedLayer, ComputedProduct, FrozenLayer, shape_of


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
    ):
        super().__init__(base, leaves, gradients)
        self._formula = formula

    def forward(self, x: Tensor) -> Tensor:
        """As ``base``, in its dtype."""

        def change(*leaves: Tensor) -> Tensor:
            return self._formula(*leaves).reshape(shape_of(self.base))

        return self.base(x) + ComputedProduct.apply(x, self.base, change, *self.leaves.values())
