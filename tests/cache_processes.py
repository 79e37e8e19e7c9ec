"""Processes that fill a cache, for ``test_cache_filling``: ``python -m tests.cache_processes fill|kill ...``.

The encoder is a stand-in that takes a millisecond; its tensors follow from the job's number.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random

import torch

from sdlora.cache.filling import Job, fill
from sdlora.cache.keys import CacheKey, latent_key
from sdlora.cache.store import EncodedCache
from sdlora.data.buckets import Placement
from sdlora.progress import Silence

PLACEMENT = Placement(width=64, height=64, scaled_width=64, scaled_height=64, left=0, top=0)


@cache
def key_of(number: int) -> CacheKey:
    return latent_key(
        pixels=str(number),
        placement=PLACEMENT,
        flipped=False,
        vae="stand-in",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def tensors_of(number: int, floats: int = 16_384) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((4, floats // 4), float(number)), "std": torch.full((4, floats // 4), -float(number))}


def run_fill(cache: EncodedCache, count: int, encoded: Callable[[int], None], seconds: float = 0.001) -> None:
    """Fill with ``count`` jobs; ``encoded`` is called just before each is encoded. The results are checked."""

    def encode(number: int) -> dict[str, torch.Tensor]:
        encoded(number)
        time.sleep(seconds)
        return tensors_of(number)

    jobs = [Job(key=key_of(number), load=lambda number=number: number) for number in range(count)]
    for number, tensors in enumerate(fill(cache, jobs, encode, progress=Silence(), task="Encoding")):
        expected = tensors_of(number)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def fill_once(folder: Path, count: int, cap: float) -> None:
    """Wait for a line on standard input, fill, and print the numbers that were encoded here."""
    print("ready", flush=True)
    sys.stdin.readline()
    numbers: list[int] = []
    run_fill(EncodedCache(folder, cap), count, numbers.append, seconds=0.004)
    print(json.dumps(numbers), flush=True)


def report(pipe: int, number: int) -> None:
    os.write(pipe, number.to_bytes(4))


def kill_often(folder: Path, count: int, kills: int) -> None:
    """Fork a filling process and kill it after it has begun to encode, ``kills`` times.

    Prints for each process the numbers that it began to encode, and those of them that are in the cache afterwards.
    """
    random, rounds = Random(0), []
    for number in range(count):
        key_of(number)  # Cached once here instead of in each process.
    for _ in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            run_fill(EncodedCache(folder, 1e9), count, partial(report, writer))
            os._exit(0)
        os.close(writer)
        begun = os.read(reader, 4)
        time.sleep(random.uniform(0, 0.015))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        while more := os.read(reader, 1 << 16):
            begun += more
        os.close(reader)
        numbers = [int.from_bytes(begun[i : i + 4]) for i in range(0, len(begun), 4)]
        left = EncodedCache(folder, 1e9)
        kept = [number for number in numbers if left.get(key_of(number)) is not None]
        rounds.append({"killed": os.WIFSIGNALED(status), "begun": numbers, "kept": kept})
    print(json.dumps(rounds), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    verb, place, *numbers = sys.argv[1:]
    if verb == "fill":
        fill_once(Path(place), int(numbers[0]), float(numbers[1]))
    else:
        kill_often(Path(place), int(numbers[0]), int(numbers[1]))
