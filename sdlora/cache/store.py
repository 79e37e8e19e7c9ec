"""What the frozen base makes of images and captions, kept between runs under the digest of all that decides it.

An entry is written beside and renamed into place, never changed, and checked when it is read; what is damaged, missing
or not to be written costs time and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..config.sections import CacheSection
from ..data.buckets import Placement
from ..progress import Progress
from .entries import Kind, encoded_folder, file_of, prune, write_entry

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

_VERSION = 1
"""Of how images are scaled and cropped, how either is encoded, and how an entry is laid out: raised with any change."""
_SHARE_BETWEEN_SCANS = 0.1
"""Of the cap: how much a process writes before it looks again how full the folder is."""


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What an entry is found by; made by ``latent_key`` and ``text_key`` alone."""

    kind: Kind
    digest: str
    """SHA-256, lower-case hexadecimal."""


def latent_key(
    *, pixels: str, placement: Placement, flipped: bool, vae: str, dtype: torch.dtype, device: torch.device
) -> CacheKey:
    """Of an image's latents: ``pixels`` is its ``shown_digest``, ``vae`` the fingerprint of the encoder and its scale.

    ``dtype`` and the kind of ``device`` are what the VAE computes in and on: both decide how it rounds.
    """
    return _key("latents", [pixels, asdict(placement), flipped, vae, str(dtype), device.type])


def text_key(
    *, ids: Sequence[Tensor], weights: Sequence[Tensor], encoders: str, dtype: torch.dtype, device: torch.device
) -> CacheKey:
    """Of a caption's embeddings: by its tokens, so that tokenizer, cutting and filling up need no mention.

    ``ids`` and ``weights`` are (chunks, 77) on the CPU, one of each for every text encoder; ``encoders`` is the
    fingerprint of these and of the layer that is read; ``dtype`` and ``device`` as in ``latent_key``.
    """
    tokens = [[own.tolist() for own in side] for side in (ids, weights)]
    return _key("text", [tokens, encoders, str(dtype), device.type])


def _key(kind: Kind, parts: list[Any]) -> CacheKey:
    text = json.dumps([kind, _VERSION, *parts], sort_keys=True, allow_nan=False)
    return CacheKey(kind=kind, digest=sha256(text.encode()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Loaded]):
    """A thing to encode; ``load`` makes what the encoder takes, in a thread of its own and only where that is needed."""

    key: CacheKey
    load: Callable[[], Loaded]


class EncodedCache:
    """Groups of named tensors on disk. Safe with any number of threads and processes.

    Nothing here raises for what the disk does: an entry that cannot be read is a miss, and a folder that cannot be
    written to is told of once and then left alone.
    """

    def __init__(self, folder: Path | None, max_bytes: float):
        """``folder`` is made when it is first needed; None keeps nothing."""
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._writable = folder is not None
        self._unscanned = 0

    def __enter__(self) -> EncodedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: CacheKey) -> dict[str, Tensor] | None:
        """The tensors of ``key``, on the CPU as they were put; None where there are none. Damage is removed."""
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
        """Keep a copy of ``tensors``; a later ``get`` of any process finds all of it or nothing."""
        if self._folder is None or not self._writable:
            return
        data = _pack(key, tensors)
        try:
            write_entry(file_of(self._folder, key.kind, key.digest), data)
        except OSError as error:
            self._give_up(error)
            return
        with self._lock:
            self._unscanned += len(data)
            due = self._unscanned >= self._max_bytes * _SHARE_BETWEEN_SCANS
        if due:
            self.close()

    def close(self) -> None:
        """Bring the folder under its cap, where this process has added to it; the cache can be used on."""
        with self._lock:
            written, self._unscanned = self._unscanned, 0
        if written and self._folder is not None:
            prune(self._folder, self._max_bytes)

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            told, self._writable = not self._writable, False
        if not told:
            logger.warning(
                "%s: what is encoded cannot be kept there (%s); this run goes on without; "
                "free some space, name another cache.folder, or set cache.disk=false",
                self._folder,
                error.strerror or error,
            )


def fill(
    cache: EncodedCache,
    jobs: Sequence[Job[Loaded]],
    encode: Callable[[Loaded], Mapping[str, Tensor]],
    *,
    progress: Progress,
    task: str,
    ahead: int = 8,
    encoders: int = 1,
) -> Generator[dict[str, Tensor]]:
    """The tensors of every job, in order, on the CPU: out of the cache, or loaded, encoded and put there.

    Threads look up and load while this one encodes; at most ``ahead`` jobs are begun and not yet handed on. Where
    ``encoders`` is more than 1, as many threads do all of a job each, with one core each. Jobs are encoded one by one,
    so that what comes out does not hang on its neighbours, and in any order within those ``ahead``, so that processes
    that fill the cache with the same jobs together seldom do the same one twice.

    Raises:
        Whatever a job's ``load`` or ``encode`` raises; what was encoded before is kept.
    """

    def begin(job: Job[Loaded]) -> Callable[[], dict[str, Tensor]]:
        """What a thread can do of ``job``; the answer does the rest."""
        found = cache.get(job.key)
        if found is not None:
            return lambda: found
        loaded = job.load()

        def finish() -> dict[str, Tensor]:
            met = cache.get(job.key)  # Another process may have put it there meanwhile.
            if met is not None:
                return met
            tensors = {name: tensor.detach().cpu() for name, tensor in encode(loaded).items()}
            cache.put(job.key, tensors)
            return tensors

        return finish

    def complete(job: Job[Loaded]) -> Callable[[], dict[str, Tensor]]:
        tensors = begin(job)()
        return lambda: tensors

    progress.start(task, len(jobs))
    begun: dict[int, Future[Callable[[], dict[str, Tensor]]]] = {}
    finished: dict[int, dict[str, Tensor]] = {}
    unbegun = iter(enumerate(jobs))
    choose = Random()  # Not the module's own, which may be seeded alike in all processes.
    pool = _loaders(min(ahead, os.cpu_count() or 1) if encoders == 1 else encoders)
    try:
        for number in range(len(jobs)):
            while number not in finished:
                for later, job in islice(unbegun, ahead - len(begun) - len(finished)):
                    begun[later] = pool.submit(begin if encoders == 1 else complete, job)
                ready = [other for other, future in begun.items() if future.done()]
                chosen = choose.choice(ready or [number])
                finished[chosen] = begun.pop(chosen).result()()
            yield finished.pop(number)
            progress.advance()
    finally:
        pool.shutdown(cancel_futures=True)
        cache.close()


def _loaders(count: int) -> ThreadPoolExecutor:
    """Threads in which torch computes with one core each.

    Where each had a team of its own, OpenMP would find more threads than cores, send those of the encoder to sleep at
    every turn, and halve its speed.
    """
    threads, started = torch.get_num_threads(), threading.Barrier(count)

    def begin() -> None:
        torch.get_num_threads()  # The first question sets the number of the process, in this thread too.
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "sdlora-load", initializer=begin)
    list(pool.map(lambda _: started.wait(), range(count)))
    torch.set_num_threads(threads)  # For threads that begin later; those that have begun keep theirs.
    return pool


def open_cache(section: CacheSection) -> EncodedCache:
    """The cache that ``[cache]`` asks for; one that keeps nothing where ``cache.disk`` is false."""
    return EncodedCache(encoded_folder(section) if section.disk else None, section.max_gigabytes * 1e9)


def _pack(key: CacheKey, tensors: Mapping[str, Tensor]) -> bytes:
    # Clones, since the format's own writer refuses tensors that share their memory.
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return save(whole, {"check": _check(key, whole)})


def _unpack(key: CacheKey, data: bytes) -> dict[str, Tensor] | None:
    """None where ``data`` is not what ``_pack`` made for ``key``."""
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
