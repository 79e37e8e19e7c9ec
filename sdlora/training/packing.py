"""Arrays of several kinds in one piece of main memory, so that a single copy brings them all to the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes: each array starts at a multiple of this many, as in memory of its own."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Named arrays in one buffer, made by ``pack``."""

    _data: Tensor
    """(bytes,) uint8, in main memory; page-locked if it is for a CUDA device."""
    _places: Mapping[str, _Place]

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Name -> tensor on ``device``, brought there by one copy for which a CUDA device's host does not wait."""
        # Elsewhere a copy that nobody waits for may read memory that is free already (Metal).
        data = self._data.to(device, non_blocking=device.type == "cuda")
        return {
            name: data[place.start : place.start + place.bytes].view(place.dtype).view(place.shape)
            for name, place in self._places.items()
        }


def pack(arrays: Mapping[str, np.ndarray], device: torch.device) -> Packed:
    """Copies of ``arrays``, to be brought to ``device``. No thread of torch's takes part."""
    places, end = {}, 0
    for name, array in arrays.items():
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        places[name] = _Place(dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, shape=array.shape, start=start)
        end = start + places[name].bytes
    data = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    buffer = data.numpy()
    for name, array in arrays.items():
        place = places[name]
        buffer[place.start : place.start + place.bytes].view(array.dtype).reshape(array.shape)[...] = array
    return Packed(_data=data, _places=places)
