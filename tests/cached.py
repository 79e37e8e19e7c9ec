"""Shared by the tests of the cache: putting, finding and comparing entries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from sdlora.cache.entries import entries, file_of
from sdlora.cache.store import EncodedCache
from tests.cache_processes import key_of, tensors_of


def only_file(folder: Path) -> Path:
    (entry,) = entries(folder)
    return entry.file


def same(found: Mapping[str, torch.Tensor] | None, expected: Mapping[str, torch.Tensor]) -> bool:
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(
            found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
        )
    )


def put_aged(cache: EncodedCache, folder: Path, count: int, floats: int = 256) -> int:
    """Put ``count`` entries, the first being the oldest; returns the size of one in bytes."""
    for number in range(count):
        cache.put(key_of(number), tensors_of(number, floats))
        file = file_of(folder, "latents", key_of(number).digest)
        os.utime(file, (1000 + number, 1000 + number))
    return file_of(folder, "latents", key_of(0).digest).stat().st_size


def present(cache: EncodedCache, count: int) -> list[int]:
    return [number for number in range(count) if cache.get(key_of(number)) is not None]
