"""What is left out of an adapter at random while it trains, as in kohya's trainer and LyCORIS.

Everything is a function of (keys of the step, module, position). So it is the same when a run is resumed, when a step is
computed in parts or by several processes, and in the second forward pass of gradient checkpointing. The device computes it
without a state and without a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""The increment and the two factors of SplitMix64 (Steele et al. 2014), as int64."""
_BITS = 24
"""Number of random bits that are compared with a rate."""


@dataclass(frozen=True, kw_only=True)
class DropoutRates:
    """Shares that are left out; 0 leaves out nothing."""

    values: float = 0.0
    """Share of the values between ``down`` and ``up``; the others are divided by 1 minus this (Srivastava et al. 2014)."""
    ranks: float = 0.0
    """Share of the ranks, for each image; the others are divided by 1 minus this. For kinds that compute a whole ΔW, share
    of its outputs, for a whole step and without a division, as in LyCORIS."""
    modules: float = 0.0
    """Share of the modules, for a whole step."""


class AdapterDropout:
    """Leaves out parts of an adapter's modules, in training steps alone: within ``drawn_by``."""

    def __init__(self, rates: DropoutRates):
        self.rates = rates
        self.keys: Tensor | None = None
        """Keys of the step that is being computed; None outside of one, where nothing is left out."""

    @contextmanager
    def drawn_by(self, keys: Tensor | None) -> Generator[None]:
        """Within the block, which holds forward and backward pass of n images, ``keys`` decide what is left out.

        ``keys`` are (n, 2) int64 on the device. The first column has a number for each image, the second one that is the
        same in every row of a step. None leaves out nothing.
        """
        self.keys = keys
        try:
            yield
        finally:
            self.keys = None

    def of(self, name: str) -> ModuleDropout | None:
        """That of the module with the canonical ``name``; None where nothing is ever left out."""
        return None if self.rates == DropoutRates() else ModuleDropout(adapter=self, name=name)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleDropout:
    """What is left out of the module with this canonical ``name``."""

    adapter: AdapterDropout
    name: str

    def hidden(self, hidden: Tensor, *, channels: int) -> Tensor:
        """``hidden``, (b, ...), after values and ranks are left out; the axis ``channels`` is that of the ranks.

        b is a multiple of the number of images, whose rows follow one another.
        """
        keys, rates = self.adapter.keys, self.adapter.rates
        if keys is None:
            return hidden
        rows, of_images = hidden.shape[0], keys[:, 0]
        if rates.values:
            kept = self._kept(of_images, hidden.numel() // len(keys), rates.values, use=1).view(hidden.shape)
            hidden = hidden * kept.to(hidden.dtype) / (1 - rates.values)
        if rates.ranks:
            shape = [rows] + [1] * (hidden.ndim - 1)
            shape[channels] = rank = hidden.shape[channels]
            kept = self._kept(of_images, rows // len(keys) * rank, rates.ranks, use=2).view(shape)
            hidden = hidden * kept.to(hidden.dtype) / (1 - rates.ranks)
        return hidden

    def outputs(self, count: int) -> Tensor | None:
        """(count,) bool: the outputs that a whole ΔW keeps in this step; None where it keeps all."""
        keys, rate = self.adapter.keys, self.adapter.rates.ranks
        return None if keys is None or not rate else self._kept(keys[:1, 1], count, rate, use=3)[0]

    def module(self, change: Tensor) -> Tensor:
        """``change`` of a module's output, or zeros of its shape where the module is left out of this step."""
        keys, rate = self.adapter.keys, self.adapter.rates.modules
        if keys is None or not rate:
            return change
        return change * self._kept(keys[:1, 1], 1, rate, use=4)[0].to(change.dtype)

    def _kept(self, keys: Tensor, count: int, rate: float, *, use: int) -> Tensor:
        """(len(keys), count) bool, each true with probability 1 - ``rate``; another ``use`` draws other numbers."""
        starts = _mixed(keys ^ (self._number + use))[:, None]
        places = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _ODD[0]
        numbers = (_mixed(starts + places) >> (64 - _BITS)) & ((1 << _BITS) - 1)
        return numbers >= round(rate * (1 << _BITS))

    @cached_property
    def _number(self) -> int:
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:7], "little")


def _mixed(values: Tensor) -> Tensor:
    """The finaliser of SplitMix64, int64 -> int64: a change of any bit changes half of all bits."""
    values = (values ^ _shifted(values, 30)) * _ODD[1]
    values = (values ^ _shifted(values, 27)) * _ODD[2]
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, places: int) -> Tensor:
    """A logical shift to the right; that of int64 repeats the sign."""
    return (values >> places) & ((1 << (64 - places)) - 1)
