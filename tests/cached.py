"""What the tests of the cache share: entries put and found, and their comparison."""

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


def same(one: Mapping[str, torch.Tensor] | None, other: Mapping[str, torch.Tensor]) -> bool:
    return (
        one is not None
        and one.keys() == other.keys()
        and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in other)
    )


def put_aged(cache: EncodedCache, folder: Path, count: int, floats: int = 256) -> int:
    """``count`` entries, the first the oldest; the size of one."""
    for number in range(count):
        cache.put(key_of(number), tensors_of(number, floats))
        file = file_of(folder, "latents", key_of(number).digest)
        os.utime(file, (1000 + number, 1000 + number))
    return file_of(folder, "latents", key_of(0).digest).stat().st_size


def present(cache: EncodedCache, count: int) -> list[int]:
    return [number for number in range(count) if cache.get(key_of(number)) is not None]
