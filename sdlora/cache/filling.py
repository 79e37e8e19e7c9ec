"""Fill the cache: look up, load and encode many images or captions, with a bounded number in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..progress import Progress
from .keys import CacheKey
from .store import EncodedCache

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Loaded]):
    """Something to encode. ``load`` makes what the encoder takes; a thread calls it if the cache has no such entry."""

    key: CacheKey
    load: Callable[[], Loaded]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Done:
    """A job whose tensors are known: found in the cache, or encoded."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class _ToEncode(Generic[Loaded]):
    """A job that is not in the cache; it is loaded and waits to be encoded."""

    key: CacheKey
    loaded: Loaded


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
    """Yield the tensors of every job, in order, on the CPU: from the cache, or loaded, encoded and put there.

    Threads look up and load while the calling thread encodes; at most ``ahead`` jobs are started and not yet yielded.
    With more than one of ``encoders``, that many threads do all steps of a job, with one core each.

    Jobs are encoded one by one, so tensors do not depend on which jobs run together. Within ``ahead`` they are encoded
    in any order, so processes that fill the cache with the same jobs at the same time seldom encode the same one.

    Raises:
        Whatever a job's ``load`` or ``encode`` raises; what was encoded before is kept.
    """
    filling = _Filling(cache=cache, encode=encode)
    progress.start(task, len(jobs))
    pool = _single_core_threads(min(ahead, os.cpu_count() or 1) if encoders == 1 else encoders)
    try:
        for tensors in filling.in_order(jobs, pool, ahead=ahead, encode_in_pool=encoders > 1):
            yield tensors
            progress.advance()
    finally:
        pool.shutdown(cancel_futures=True)
        cache.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Filling(Generic[Loaded]):
    """The steps of a job, and the order in which jobs take them."""

    cache: EncodedCache
    encode: Callable[[Loaded], Mapping[str, Tensor]]

    def look_up_or_load(self, job: Job[Loaded]) -> _Done | _ToEncode[Loaded]:
        tensors = self.cache.get(job.key)
        return _ToEncode(key=job.key, loaded=job.load()) if tensors is None else _Done(tensors=tensors)

    def finish(self, state: _Done | _ToEncode[Loaded]) -> dict[str, Tensor]:
        if isinstance(state, _Done):
            return state.tensors
        # Another process may have put it there since the first look-up.
        from_another_process = self.cache.get(state.key)
        if from_another_process is not None:
            return from_another_process
        tensors = {name: tensor.detach().cpu() for name, tensor in self.encode(state.loaded).items()}
        self.cache.put(state.key, tensors)
        return tensors

    def do_all(self, job: Job[Loaded]) -> _Done:
        return _Done(tensors=self.finish(self.look_up_or_load(job)))

    def in_order(
        self, jobs: Sequence[Job[Loaded]], pool: Executor, *, ahead: int, encode_in_pool: bool
    ) -> Generator[dict[str, Tensor]]:
        work = self.do_all if encode_in_pool else self.look_up_or_load
        not_started = iter(enumerate(jobs))
        started: dict[int, Future[_Done | _ToEncode[Loaded]]] = {}
        finished: dict[int, dict[str, Tensor]] = {}
        random = Random()  # Not the module's generator, which may have the same seed in every process.
        for position in range(len(jobs)):
            while position not in finished:
                for later, job in islice(not_started, ahead - len(started) - len(finished)):
                    started[later] = pool.submit(work, job)
                ready = [candidate for candidate, future in started.items() if future.done()]
                chosen = random.choice(ready or [position])
                finished[chosen] = self.finish(started.pop(chosen).result())
            yield finished.pop(position)


def _single_core_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch computes with one core each.

    If each had a team of its own, OpenMP would find more threads than cores, put those of the encoder to sleep at
    every turn, and halve its speed.
    """
    threads, all_started = torch.get_num_threads(), threading.Barrier(count)

    def use_one_core() -> None:
        torch.get_num_threads()  # The first call copies the process's setting into this thread.
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "sdlora-load", initializer=use_one_core)
    list(pool.map(lambda _: all_started.wait(), range(count)))
    torch.set_num_threads(threads)  # For threads started later; those of the pool keep theirs.
    return pool
