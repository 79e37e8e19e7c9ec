"""What an adapter needs to know of a kind of change in order to train it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from .adapted_layer import FrozenLayer
from .change import Change
from .quantized import QuantizedLinear

NOTHING_FIXED: Mapping[str, Tensor] = MappingProxyType({})
"""``Trainable.fixed`` of most kinds."""


class Trainable(Protocol):
    """A frozen module, and the trained tensors that change it."""

    @property
    def module(self) -> nn.Module:
        """The frozen module, which ``layer`` replaces."""

    @property
    def like(self) -> Tensor:
        """An empty tensor on the device and of the dtype in which the layer computes."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of each trained tensor, in a fixed order."""

    @property
    def fixed(self) -> Mapping[str, Tensor]:
        """Name -> live tensor that ``layer`` computes with besides what is trained, contiguous, of the dtype of ``like``.

        A part of the state of a run: what another device or machine computes in its place may differ.
        """

    def start(self, name: str, seed: int) -> Mapping[str, Tensor]:
        """Start values, float32, as a function of ``seed`` and the module's canonical ``name``; those left out are zero."""

    def layer(self, leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> nn.Module:
        """The layer that computes with ``leaves``, by the names of ``shapes``, of the dtype of ``like``.

        Its backward pass adds to ``gradients``, whatever happens to the ``.grad`` of the leaves.
        """

    def change(self, tensors: Mapping[str, Tensor]) -> Change:
        """The change of the pristine weight that trained ``tensors``, float32 on the CPU, make."""


def like_of(module: FrozenLayer) -> Tensor:
    """``Trainable.like`` of a frozen layer."""
    if isinstance(module, QuantizedLinear):
        return torch.empty(0, device=module.device, dtype=module.dtype)
    return module.weight.new_empty(0)
