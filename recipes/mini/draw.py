"""Draw all training images with all cores: ``python -m recipes.mini.draw --art DIR --work DIR --pool N --variants N``.

It is a process of its own, without torch, so that its workers are small and start at once. It leaves in ``--work``:

- ``pool.npy``, (n, RASTER, RASTER, 3) uint8, for the autoencoder: image n is a function of (seed, n);
- ``composed.npy``, (n, SIZE, SIZE, 3) uint8, for the diffusion model: the drawings of the subjects on their backgrounds,
  in the order of ``placements``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from .art import RASTER, SIZE, Art, Placement, compose, draw_placement, load_art
from .kinds import Sources, learned
from .sources import learned_sources

SEED = 1
PLACEMENT_SEED = 2
CHUNK = 50
_sources: Sources | None = None
_places: list[tuple[Art, Placement]] = []


def placements(arts: list[Art], variants: int) -> list[tuple[Art, Placement]]:
    """Every drawing in ``variants`` placements."""
    rng = np.random.default_rng(PLACEMENT_SEED)
    return [(art, draw_placement(rng, art.mirror)) for art in arts for _ in range(variants)]


def _learned(first: int) -> np.ndarray:
    assert _sources is not None
    return np.stack([learned(np.random.default_rng([SEED, first + i]), _sources) for i in range(CHUNK)])


def _composed(first: int) -> np.ndarray:
    return np.stack([compose(art, place) for art, place in _places[first : first + CHUNK]])


def _fill(file: Path, count: int, side: int, draw: Callable[[int], np.ndarray]) -> None:
    """Write ``count`` images; the file appears when it is whole."""
    began, drawn = time.monotonic(), 0
    partial = file.with_suffix(".partial.npy")
    images = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, side, side, 3))
    # An executor, not a pool: it reports a worker that ends, and an error of one at once.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as executor:
        for part in executor.map(draw, range(0, count, CHUNK)):
            images[drawn : drawn + len(part)] = part
            drawn += len(part)
            if drawn % 5000 < CHUNK:
                print(f"{file.name}: {drawn} of {count}, {time.monotonic() - began:.0f} s", flush=True)
    partial.replace(file)


def draw_all(node_modules: Path, work: Path, *, pool: int, variants: int) -> None:
    """Both files, where they are not there yet."""
    global _sources, _places
    began = time.monotonic()
    if not (work / "composed.npy").exists():
        _places = placements(load_art(node_modules), variants)
        print(f"subjects rasterised, {time.monotonic() - began:.0f} s", flush=True)
        _fill(work / "composed.npy", len(_places), SIZE, _composed)
    if not (work / "pool.npy").exists():
        _sources = learned_sources(node_modules)
        print(f"other drawings rasterised, {time.monotonic() - began:.0f} s", flush=True)
        _fill(work / "pool.npy", pool, RASTER, _learned)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--art", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pool", type=int, required=True)
    parser.add_argument("--variants", type=int, required=True)
    given = parser.parse_args()
    draw_all(given.art, given.work, pool=given.pool, variants=given.variants)
