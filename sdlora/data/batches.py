"""Which pictures make up the batch of a step: a function of (seed, step), so that a resumed run needs no memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .buckets import Placement

_ORDER, _NOISE, _TIMESTEP, _POSTERIOR, _DROPOUT = range(5)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Pictures grouped by bucket; a batch never mixes sizes, and a remainder is a smaller batch, never dropped."""

    buckets: tuple[tuple[int, ...], ...]
    """Picture numbers of each bucket."""
    batch_size: int
    seed: int

    @classmethod
    def of(cls, placements: Sequence[Placement], *, batch_size: int, seed: int) -> BatchPlan:
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, placement in enumerate(placements):
            by_size.setdefault((placement.width, placement.height), []).append(number)
        buckets = tuple(tuple(numbers) for _, numbers in sorted(by_size.items()))
        return cls(buckets=buckets, batch_size=batch_size, seed=seed)

    @property
    def batches_per_epoch(self) -> int:
        return sum(math.ceil(len(bucket) / self.batch_size) for bucket in self.buckets)

    def batch(self, step: int) -> tuple[int, ...]:
        """Picture numbers of the batch of ``step`` (from 0)."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self.epoch(epoch)[position]

    def epoch(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        """Every batch of an epoch, in order: each picture once."""
        return _epoch(self, epoch)


@lru_cache(maxsize=2)
def _epoch(plan: BatchPlan, epoch: int) -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng([plan.seed, _ORDER, epoch])
    batches = []
    for bucket in plan.buckets:
        order = [bucket[i] for i in rng.permutation(len(bucket))]
        batches += [tuple(order[i : i + plan.batch_size]) for i in range(0, len(order), plan.batch_size)]
    return tuple(batches[i] for i in rng.permutation(len(batches)))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one picture in one step: a function of (seed, step, slot) and nothing else."""

    noise: np.ndarray
    """float32, the latent's shape."""
    posterior: np.ndarray
    """float32, the latent's shape: where in the encoder's posterior the latent is taken."""
    timestep: int
    drop_caption: bool


def draw(
    *, seed: int, step: int, slot: int, slots: int, shape: tuple[int, ...], timesteps: int, caption_dropout: float
) -> Draws:
    """Draw for ``slot`` of ``slots`` in ``step``.

    Timesteps are stratified over the batch: slot k draws from the k-th of ``slots`` equal parts, in a shuffled order,
    which evens out the loss without changing what is drawn on average.
    """

    def rng(stream: int, *more: int) -> np.random.Generator:
        return np.random.default_rng([seed, stream, step, *more])

    stratum = int(rng(_TIMESTEP).permutation(slots)[slot])
    position = (stratum + rng(_TIMESTEP, slot).random()) / slots
    return Draws(
        noise=rng(_NOISE, slot).standard_normal(shape, dtype=np.float32),
        posterior=rng(_POSTERIOR, slot).standard_normal(shape, dtype=np.float32),
        timestep=min(timesteps - 1, int(position * timesteps)),
        drop_caption=bool(rng(_DROPOUT, slot).random() < caption_dropout),
    )
