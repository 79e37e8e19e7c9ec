"""Training images of the autoencoder, drawn by all cores before the training and kept as one array."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np

from .art import RASTER
from .kinds import Sources, learned
from .sources import learned_sources

SEED = 1
CHUNK = 250
_sources: Sources | None = None


def _take(sources: Sources) -> None:
    global _sources
    _sources = sources


def _draw(first: int) -> np.ndarray:
    assert _sources is not None
    return np.stack([learned(np.random.default_rng([SEED, first + i]), _sources) for i in range(CHUNK)])


def training_pool(node_modules: Path, work: Path, count: int) -> np.ndarray:
    """(count, RASTER, RASTER, 3) uint8, mapped from ``work/pool.npy``; image n is a function of (seed, n).

    Args:
        count: a multiple of ``CHUNK``.
    """
    file = work / "pool.npy"
    if not file.exists():
        sources = learned_sources(node_modules)
        partial = file.with_name("pool.partial.npy")
        images = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, RASTER, RASTER, 3))
        context = multiprocessing.get_context("fork")
        with context.Pool(initializer=_take, initargs=(sources,)) as pool:
            for number, part in enumerate(pool.imap(_draw, range(0, count, CHUNK))):
                images[number * CHUNK : (number + 1) * CHUNK] = part
        images.flush()
        partial.replace(file)
    return np.load(file, mmap_mode="r")
