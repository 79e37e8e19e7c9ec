"""A low-rank change beside a convolution, or beside any layer where parts of it are left out at random."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .adapted_layer import AdaptedLayer, FrozenLayer, channels_axis, product, raised
from .dropout import ModuleDropout


class LowRankLayer(AdaptedLayer):
    """``base`` plus ``scale`` · ``up`` @ ``down``.

    ``down`` (rank, in[, kh, kw]) is a layer like ``base`` with as many outputs as ranks, ``up`` (out, rank[, 1, 1]) one of
    1 x 1 after it.
    """

    def __init__(
        self,
        base: FrozenLayer,
        leaves: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        *,
        scale: float,
        dropout: ModuleDropout | None = None,
    ):
        super().__init__(base, leaves, gradients)
        self.scale, self._dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """As ``base``, in its dtype."""
        hidden = product(self.base, x, self.leaves["down"])
        if self._dropout is None:
            return self.base(x) + raised(self.base, hidden * self.scale, self.leaves["up"])
        hidden = self._dropout.hidden(hidden, channels=channels_axis(self.base))
        return self.base(x) + self._dropout.module(raised(self.base, hidden * self.scale, self.leaves["up"]))
