"""DoRA as it is trained: a magnitude for each output, and a low-rank change of the direction (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .adapted_layer import AdaptedLayer, FrozenLayer, channels_axis, product, raised, shape_of, weight_of
from .dropout import ModuleDropout
from .kinds import Decomposed
from .low_rank_trainable import TrainableLowRank


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainableDecomposed:
    """m · (W + ΔW) / ‖W + ΔW‖ in the place of W, with the ΔW of ``direction`` (eq. 5).

    The magnitude m is trained as its difference from ‖W‖, which starts at zero: so the change is zero at the start in
    half precision too, and small steps are not rounded away. AdamW moves the difference as it would move m, except that
    its weight decay pulls m towards ‖W‖ and not towards zero.
    """

    direction: TrainableLowRank

    @property
    def fixed(self) -> Mapping[str, Tensor]:
        """See ``Trainable``."""
        return self.direction.fixed

    @property
    def module(self) -> FrozenLayer:
        """See ``Trainable``."""
        return self.direction.module

    @property
    def like(self) -> Tensor:
        """See ``Trainable``."""
        return self.direction.like

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """``down`` and ``up`` of ``direction``, and ``magnitude`` (out,): the difference from ‖W‖."""
        return {**self.direction.shapes, "magnitude": shape_of(self.module)[:1]}

    def start(self, name: str, seed: int) -> Mapping[str, Tensor]:
        """See ``Trainable``."""
        return self.direction.start(name, seed)

    def layer(self, leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> DecomposedLayer:
        """See ``Trainable``."""
        scale = self.direction.alpha / self.direction.rank
        dropout, lengths = self.direction.dropout, self._lengths
        return DecomposedLayer(self.module, leaves, gradients, scale=scale, lengths=lengths, dropout=dropout)

    def change(self, tensors: Mapping[str, Tensor]) -> Decomposed:
        """See ``Trainable``; the magnitude is (out, 1[, 1, 1]), as LyCORIS has it."""
        magnitude = self._lengths.to(tensors["magnitude"]) + tensors["magnitude"]
        column = magnitude.view(-1, *[1] * (len(shape_of(self.module)) - 1))
        return Decomposed(inner=self.direction.change(tensors), magnitude=column)

    @cached_property
    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """‖W‖ of each output, (out,) float32."""
        return _lengths(weight_of(self.module).float())


class DecomposedLayer(AdaptedLayer):
    """A ``base`` whose weight W is m · (W + ΔW) / ‖W + ΔW‖, with ΔW = ``scale`` · ``up`` @ ``down``.

    m is ``lengths`` + ``magnitude``. No gradient flows through ‖W + ΔW‖ (section 4.3), which is computed in float32, and of
    the whole ΔW where ``dropout`` leaves out some of it.
    """

    def __init__(
        self,
        base: FrozenLayer,
        leaves: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        *,
        scale: float,
        lengths: Tensor,
        dropout: ModuleDropout | None = None,
    ):
        super().__init__(base, leaves, gradients)
        self.scale, self._lengths, self._dropout = scale, lengths, dropout

    def forward(self, x: Tensor) -> Tensor:
        """As ``base``, in its dtype."""
        down, up = self.leaves["down"], self.leaves["up"]
        pristine = self.base(x)
        hidden = product(self.base, x, down)
        if self._dropout is not None:
            hidden = self._dropout.hidden(hidden, channels=channels_axis(self.base))
        change = raised(self.base, hidden * self.scale, up)
        turned = change + (pristine if self.base.bias is None else pristine - self._by_channel(self.base.bias))
        # (m - ‖W + ΔW‖) / ‖W + ΔW‖: the factor less 1 keeps its precision where the factor would be rounded to 1.
        with torch.no_grad():
            # An output whose weights are all zero stays zero.
            length = self._changed_lengths(down, up).clamp(min=torch.finfo(torch.float32).eps)
            behind = self._lengths - length
        factor = (behind + self.leaves["magnitude"].float()) / length
        turning = turned * self._by_channel(factor.to(x.dtype))
        if self._dropout is not None:
            return pristine + self._dropout.module(change + turning)
        return pristine + change + turning

    def _changed_lengths(self, down: Tensor, up: Tensor) -> Tensor:
        """‖W + ΔW‖ of each output, (out,) float32."""
        weight = weight_of(self.base).float().flatten(1)
        return _lengths(torch.addmm(weight, up.float().flatten(1), down.float().flatten(1), alpha=self.scale))

    def _by_channel(self, values: Tensor) -> Tensor:
        return values.view(-1, 1, 1) if isinstance(self.base, nn.Conv2d) else values


def _lengths(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)
