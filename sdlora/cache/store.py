"""Latents and caption embeddings on disk, one entry for each key.

An entry is written beside its place and renamed into it, never changed, and checked when it is read. Damage, a missing
file or a full disk costs time and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..config.sections import CacheSection
from .entries import encoded_folder, file_of, prune, write_entry
from .keys import CacheKey

logger = logging.getLogger(__name__)

_SHARE_BETWEEN_SCANS = 0.1
"""Share of the cap that a process writes before it measures the folder again."""


class EncodedCache:
    """Groups of named tensors on disk. Safe with any number of threads and processes.

    Nothing here raises for a fault of the disk: an entry that cannot be read is a miss, and a folder that cannot be
    written to is reported once and then left alone.
    """

    def __init__(self, folder: Path | None, max_bytes: float):
        """``folder`` is created when it is first needed; None keeps nothing."""
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._writable = folder is not None
        self._written_since_scan = 0

    def __enter__(self) -> EncodedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: CacheKey) -> dict[str, Tensor] | None:
        """The tensors of ``key`` as they were put, on the CPU; None if there are none. A damaged entry is removed."""
        if self._folder is None:
            return None
        file = file_of(self._folder, key.kind, key.digest)
        try:
            data = file.read_bytes()
        except OSError:
            return None
        tensors = _unpack(key, data)
        with suppress(OSError):
            if tensors is None:
                file.unlink()
            else:
                os.utime(file)
        return tensors

    def put(self, key: CacheKey, tensors: Mapping[str, Tensor]) -> None:
        """Keep a copy of ``tensors``; a later ``get`` of any process finds all of them or nothing."""
        if self._folder is None or not self._writable:
            return
        data = _pack(key, tensors)
        try:
            write_entry(file_of(self._folder, key.kind, key.digest), data)
        except OSError as error:
            self._stop_writing(error)
            return
        with self._lock:
            self._written_since_scan += len(data)
            due = self._written_since_scan >= self._max_bytes * _SHARE_BETWEEN_SCANS
        if due:
            self.close()

    def close(self) -> None:
        """Bring the folder under its cap if this process has added to it; the cache stays usable."""
        with self._lock:
            written, self._written_since_scan = self._written_since_scan, 0
        if written and self._folder is not None:
            prune(self._folder, self._max_bytes)

    def _stop_writing(self, error: OSError) -> None:
        with self._lock:
            reported, self._writable = not self._writable, False
        if not reported:
            logger.warning(
                "%s: cannot write to the cache (%s); this run continues without it; "
                "free some space, choose another cache.folder, or set cache.disk=false",
                self._folder,
                error.strerror or error,
            )


def open_cache(section: CacheSection) -> EncodedCache:
    """The cache that ``[cache]`` configures; one that keeps nothing if ``cache.disk`` is false."""
    return EncodedCache(encoded_folder(section) if section.disk else None, section.max_gigabytes * 1e9)


def _pack(key: CacheKey, tensors: Mapping[str, Tensor]) -> bytes:
    # Clones, since the format's own writer refuses tensors that share their memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return save(copies, {"check": _check(key, copies)})


def _unpack(key: CacheKey, data: bytes) -> dict[str, Tensor] | None:
    """The tensors that ``_pack`` put into ``data`` for ``key``; None if it did not make it."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        check = json.loads(data[8 : 8 + length])["__metadata__"]["check"]
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return tensors if check == _check(key, tensors) else None


def _check(key: CacheKey, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over the key, and over name, dtype, shape and bytes of every tensor."""
    value = zlib.crc32(key.digest.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(), value)
        value = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"
