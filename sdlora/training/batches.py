"""Images of each batch, as a function of (seed, step): a resumed run needs to remember nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..config.sections import ObjectiveSection
from ..randomness import Stream, generator
from .objective import multires_noise, offset_noise, perturbed, timestep_at

PLAIN = ObjectiveSection()


@dataclass(frozen=True, kw_only=True)
class Showing:
    """Image ``number`` is shown; it was shown ``turn`` times before."""

    number: int
    turn: int


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Images grouped by size; a batch never mixes sizes, and a remainder is a smaller batch, never dropped."""

    buckets: tuple[tuple[int, ...], ...]
    """Image numbers of each bucket."""
    repeats: tuple[int, ...]
    """Times that an epoch shows each image; 0 is never."""
    batch_size: int
    seed: int

    @classmethod
    def of(
        cls, sizes: Sequence[tuple[int, int]], *, repeats: Sequence[int] | None = None, batch_size: int, seed: int
    ) -> BatchPlan:
        """Plan for images of these sizes (width, height); an epoch shows each once, or as often as ``repeats`` says."""
        times = tuple(repeats) if repeats is not None else (1,) * len(sizes)
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, size in enumerate(sizes):
            if times[number]:
                by_size.setdefault(size, []).append(number)
        buckets = tuple(tuple(numbers) for _, numbers in sorted(by_size.items()))
        return cls(buckets=buckets, repeats=times, batch_size=batch_size, seed=seed)

    @property
    def batches_per_epoch(self) -> int:
        """Steps in which an epoch shows every image as often as it should be."""
        shown = (sum(self.repeats[number] for number in bucket) for bucket in self.buckets)
        return sum(math.ceil(count / self.batch_size) for count in shown)

    def batch(self, step: int) -> tuple[Showing, ...]:
        """Showings of ``step`` (from 0)."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self.epoch(epoch)[position]

    def epoch(self, epoch: int) -> tuple[tuple[Showing, ...], ...]:
        """Every batch of ``epoch`` (from 0), in order."""
        return _epoch(self, epoch)


@lru_cache(maxsize=2)
def _epoch(plan: BatchPlan, epoch: int) -> tuple[tuple[Showing, ...], ...]:
    rng = generator(plan.seed, Stream.ORDER, epoch)
    batches = []
    for bucket in plan.buckets:
        showings = [
            Showing(number=number, turn=epoch * plan.repeats[number] + again)
            for number in bucket
            for again in range(plan.repeats[number])
        ]
        order = [showings[i] for i in rng.permutation(len(showings))]
        batches += [tuple(order[i : i + plan.batch_size]) for i in range(0, len(order), plan.batch_size)]
    return tuple(batches[i] for i in rng.permutation(len(batches)))


def regularisation_repeats(wanted: int, repeats: Sequence[int]) -> tuple[int, ...]:
    """Times that an epoch of ``wanted`` training showings shows each regularisation image.

    As in kohya's trainer: as many of them as of training images. Each is taken as often as its set says, in order,
    until there are enough; images after that are never shown. Where all are too few, each is shown once more, in
    order, until there are enough. (kohya's trainer lets the last image of the first round go over the mark.)
    """
    shown, left = [], wanted
    for times in repeats:
        shown.append(min(times, left))
        left -= shown[-1]
    if not shown:
        return ()
    rounds, rest = divmod(left, len(shown))
    return tuple(times + rounds + (number < rest) for number, times in enumerate(shown))


def share(count: int, *, process: int, processes: int) -> range:
    """Which of a batch's ``count`` slots this process computes; together the processes compute each once."""
    return range(process, count, processes)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one image in one step: a function of (seed, step, slot) and nothing else."""

    noise: np.ndarray
    """float32, the latent's shape."""
    posterior: np.ndarray
    """float32, the latent's shape: where in the encoder's posterior the latent is taken."""
    timestep: int
    drop_caption: bool
    input_noise: np.ndarray | None
    """The noise in the UNet's input, where it is not ``noise``."""


def draw(
    *,
    seed: int,
    step: int,
    slot: int,
    slots: int,
    shape: tuple[int, ...],
    timesteps: int,
    caption_dropout: float,
    objective: ObjectiveSection = PLAIN,
) -> Draws:
    """Draw for ``slot`` of ``slots`` in ``step``.

    Timesteps are stratified over the batch: slot k draws from the k-th of ``slots`` equal parts, in a shuffled order,
    which evens out the loss without changing what is drawn on average. ``objective`` says which noise is drawn, and from
    which of the schedule's ``timesteps``.
    """

    def rng(stream: Stream, *more: int) -> np.random.Generator:
        return generator(seed, stream, step, *more)

    stratum = int(rng(Stream.TIMESTEP).permutation(slots)[slot])
    position = (stratum + rng(Stream.TIMESTEP, slot).random()) / slots
    noise = rng(Stream.NOISE, slot).standard_normal(shape, dtype=np.float32)
    if objective.noise_offset:
        noise = offset_noise(noise, rng(Stream.NOISE_OFFSET, slot), objective.noise_offset)
    if objective.multires_noise_iterations:
        noise = multires_noise(
            noise,
            rng(Stream.MULTIRES_NOISE, slot),
            iterations=objective.multires_noise_iterations,
            discount=objective.multires_noise_discount,
        )
    gamma = objective.input_perturbation
    return Draws(
        noise=noise,
        input_noise=perturbed(noise, rng(Stream.INPUT_PERTURBATION, slot), gamma) if gamma else None,
        posterior=rng(Stream.POSTERIOR, slot).standard_normal(shape, dtype=np.float32),
        timestep=timestep_at(position, objective, timesteps),
        drop_caption=bool(rng(Stream.CAPTION_DROPOUT, slot).random() < caption_dropout),
    )


def dropout_keys(*, seed: int, step: int, slots: Sequence[int]) -> np.ndarray:
    """What decides what is left out of the adapter, (len(slots), 2) int64; see ``AdapterDropout.drawn_by``."""

    def key(*position: int) -> int:
        return int(generator(seed, Stream.ADAPTER_DROPOUT, step, *position).integers(np.iinfo(np.int64).max))

    return np.array([(key(1, slot), key(0)) for slot in slots], np.int64)
