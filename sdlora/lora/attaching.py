"""Put layers in the places of others: for LoRAs whose changes cannot be added to a quantised weight."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .change import Change
from .low_rank import LowRank
from .merging import temporarily_merged
from .quantized import QuantizedLinear


def put_in_place(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> None:
    """Put each of ``layers`` where its name says; ``modules`` maps every canonical name, parents too, to its module."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer)


class ChangedLinear(nn.Module):
    """A quantised layer with the changes of several LoRAs beside it, each times its strength.

    All low-rank changes are one pair of matrices, whose ranks add up. Changes of other kinds are summed in float32 into
    one whole matrix of the layer's dtype, which takes as much memory as the weight did before it was quantised.
    """

    def __init__(self, base: QuantizedLinear, changes: Sequence[tuple[Change, float]]):
        super().__init__()
        self.base = base
        self._low_rank = _joined(base, changes)
        self._whole = _summed(base, changes)
        moves = [strength * move.float() for change, strength in changes if (move := change.bias_delta()) is not None]
        self._bias = torch.stack(moves).sum(0).flatten().to(base.device, base.dtype) if moves else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)
        if self._low_rank is not None:
            down, up = self._low_rank
            y = y + (x @ down.T) @ up.T
        if self._whole is not None:
            y = y + x @ self._whole.T
        return y if self._bias is None else y + self._bias


def _joined(base: QuantizedLinear, changes: Sequence[tuple[Change, float]]) -> tuple[Tensor, Tensor] | None:
    """Σ w · s · up @ down as one product: (Σ rank, in) and (out, Σ rank), of the base's dtype."""
    pairs = [(change, strength) for change, strength in changes if isinstance(change, LowRank) and change.mid is None]
    if not pairs:
        return None
    down = torch.cat([change.down.float().flatten(1) for change, _ in pairs])
    up = torch.cat([change.up.float().flatten(1) * (change.scale * strength) for change, strength in pairs], dim=1)
    return down.to(base.device, base.dtype), up.to(base.device, base.dtype)


def _summed(base: QuantizedLinear, changes: Sequence[tuple[Change, float]]) -> Tensor | None:
    """Σ w · ΔW of all other kinds, (out, in), of the base's dtype; those that depend on W get the expanded one."""
    others = [entry for entry in changes if not isinstance(entry[0], LowRank) or entry[0].mid is not None]
    if not others:
        return None
    weight = base.dense().float()
    total = torch.zeros_like(weight)
    for change, strength in others:
        total += strength * change.delta(weight)
    return total.to(base.dtype)


@contextmanager
@torch.no_grad()
def temporarily_applied(
    modules: Mapping[str, nn.Module], loras: Sequence[Mapping[str, tuple[Change, float]]]
) -> Generator[None]:
    """Within the block, all changes take effect: beside quantised layers, merged into every other weight.

    Each LoRA maps canonical module names to (change, weight). On leaving, all is as before, bit for bit.

    Raises:
        KeyError: a name is not in ``modules``; RuntimeError: a change does not fit its weight.
    """
    names = sorted({name for lora in loras for name in lora})
    quantized = {name: layer for name in names if isinstance(layer := modules[name], QuantizedLinear)}
    changed = {
        name: ChangedLinear(layer, [lora[name] for lora in loras if name in lora]) for name, layer in quantized.items()
    }
    others = [{name: change for name, change in lora.items() if name not in quantized} for lora in loras]
    put_in_place(modules, changed)
    try:
        with temporarily_merged(modules, others):
            yield
    finally:
        put_in_place(modules, quantized)
