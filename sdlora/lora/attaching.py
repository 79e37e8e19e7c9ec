"""Put layers in the places of others: for LoRAs whose changes cannot be added to a weight, or change with every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CompatibilityError
from .kinds import Full
from .low_rank import LowRank, joined
from .merging import Weighted
from .quantized import QuantizedLinear


def put_in_place(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> None:
    """Put each of ``layers`` where its name says; ``modules`` maps every canonical name, parents too, to its module."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer)


def can_merge(module: nn.Module) -> bool:
    """Whether changes can be added to the weight: an ordinary tensor of 16 bits or more, in memory.

    Others are quantised, by this package or another, or are in main memory until the layer needs them (``meta`` meanwhile).
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    wide = weight.is_floating_point() and weight.dtype.itemsize >= torch.float16.itemsize
    return wide and weight.device.type != "meta" and type(weight.data) is Tensor


def can_attach(module: nn.Module) -> bool:
    """Whether a low-rank change can be computed beside ``module``."""
    return isinstance(module, QuantizedLinear | nn.Linear | nn.Conv2d)


class Factors:
    """A factor for each LoRA whose weight changes with the steps, on every device that layers read it from.

    Writing changes no tensor but the values in it, so compiled code stays valid.
    """

    def __init__(self, count: int):
        self.values = (1.0,) * count
        self._on: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def set(self, values: Sequence[float]) -> None:
        """Give every factor its value."""
        self.values = tuple(values)
        for tensor in self._on.values():
            tensor.copy_(torch.tensor(self.values))

    def like(self, tensor: Tensor) -> Tensor:
        """(count,), where and as ``tensor`` is."""
        place = (tensor.device, tensor.dtype)
        if place not in self._on:
            self._on[place] = torch.tensor(self.values, dtype=tensor.dtype, device=tensor.device)
        return self._on[place]


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What is computed beside a layer."""

    low_rank: tuple[tuple[LowRank, float, int | None], ...] = ()
    """Change, weight, and number of the factor that the weight is multiplied by in each step."""
    others: tuple[Weighted, ...] = ()
    """Changes of other kinds, and all changes of a bias."""


class AttachedLayer(nn.Module):
    """A layer with the changes of several LoRAs beside it, each times its strength.

    All low-rank changes are one pair of matrices, whose ranks add up. Changes of other kinds are summed in float32 into
    one whole matrix of the layer's dtype, which takes as much memory as the weight does where it is not quantised.
    """

    down: Tensor | None
    """(Σ rank, in · kh · kw)."""
    up: Tensor | None
    """(out, Σ rank)."""
    rows: Tensor | None
    """(Σ rank,): the number of the factor of each row, where there are factors."""
    whole: Tensor | None
    bias: Tensor | None

    def __init__(self, base: nn.Module, beside: Beside, factors: Factors):
        super().__init__()
        self.base = base
        self._factors = factors
        device, dtype = _place(base)
        like = torch.empty(0, device=device)
        down = up = rows = whole = bias = None
        if beside.low_rank:
            down, up = joined([(change, strength) for change, strength, _ in beside.low_rank], like)
            down, up = down.to(dtype), up.to(dtype)
            if any(slot is not None for *_, slot in beside.low_rank):
                # Constant weights have a factor of 1, after those of the others.
                slots = [len(factors.values) if slot is None else slot for *_, slot in beside.low_rank]
                ranks = torch.tensor([change.rank for change, *_ in beside.low_rank])
                rows = torch.tensor(slots).repeat_interleave(ranks).to(device)
        weighing = [entry for entry in beside.others if not (isinstance(entry[0], Full) and entry[0].diff is None)]
        if weighing:
            whole = _summed(base, weighing).to(device, dtype)
        moves = [
            strength * move.to(like) for change, strength in beside.others if (move := change.bias_delta()) is not None
        ]
        if moves:
            bias = torch.stack([move.flatten() for move in moves]).sum(0).to(dtype)
        for name, tensor in {"down": down, "up": up, "rows": rows, "whole": whole, "bias": bias}.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), or (b, in, h, w) -> (b, out, h, w) beside a convolution."""
        y = self.base(x)
        x = x.to(y)
        if self.down is not None and self.up is not None:
            down, up = self.down.to(y), self.up.to(y)
            inner = self._applied(x, down)
            if self.rows is not None:
                factors = F.pad(self._factors.like(y), (0, 1), value=1.0)[self.rows.to(y.device)]
                inner = inner * (factors[:, None, None] if isinstance(self.base, nn.Conv2d) else factors)
            y = y + (F.conv2d(inner, up[:, :, None, None]) if isinstance(self.base, nn.Conv2d) else F.linear(inner, up))
        if self.whole is not None:
            y = y + self._applied(x, self.whole.to(y))
        if self.bias is not None:
            y = y + (self.bias.to(y)[:, None, None] if isinstance(self.base, nn.Conv2d) else self.bias.to(y))
        return y

    def _applied(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``x`` through a layer like the base whose weight is ``matrix``, (out, in · kh · kw)."""
        base = self.base
        if not isinstance(base, nn.Conv2d):
            return F.linear(x, matrix.flatten(1))
        kernel = matrix.view(matrix.shape[0], base.in_channels, *base.kernel_size)
        return F.conv2d(x, kernel, None, base.stride, base.padding, base.dilation)


def _place(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the tensors beside ``base`` are, and their dtype; those beside an offloaded layer wait in main memory."""
    if isinstance(base, QuantizedLinear):
        return base.device, base.dtype
    weight = base.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(base).__name__} has no weight to change")
    whole = weight.is_floating_point() and weight.dtype.itemsize >= torch.float16.itemsize
    on_meta = weight.device.type == "meta"
    return torch.device("cpu") if on_meta else weight.device, weight.dtype if whole else torch.float32


def _summed(base: nn.Module, changes: Sequence[Weighted]) -> Tensor:
    """Σ w · ΔW of all ``changes``, float32; those that depend on W get the expanded one."""
    weight = _dense(base)
    if weight is None:
        reading = next((change for change, _ in changes if change.reads_weight), None)
        if reading is not None:
            raise CompatibilityError(
                f"a change of the kind {reading.kind} depends on the weight of its {type(base).__name__}, which cannot be "
                "read; load the base without this quantisation"
            )
        weight = torch.zeros(_shape(base))
    total = torch.zeros_like(weight)
    for change, strength in changes:
        total += strength * change.delta(weight)
    return total


def _dense(base: nn.Module) -> Tensor | None:
    """The weight in float32; None where another library keeps it in a form of its own."""
    if isinstance(base, QuantizedLinear):
        return base.dense().float()
    weight = base.weight
    if isinstance(weight, Tensor) and weight.device.type == "meta":
        # Accelerate's offloading keeps the weights of a layer beside its hook.
        kept = getattr(getattr(base, "_hf_hook", None), "weights_map", None)
        weight = None if kept is None else kept["weight"]
    readable = isinstance(weight, Tensor) and weight.is_floating_point() and type(weight.data) is Tensor
    return weight.detach().float() if readable else None


def _shape(base: nn.Module) -> tuple[int, ...]:
    if isinstance(base, nn.Conv2d):
        return (base.out_channels, base.in_channels, *base.kernel_size)
    assert isinstance(base, nn.Linear)
    return (base.out_features, base.in_features)
