"""Encoding a folder of pictures into the cache, as a share of the rate of the bare VAE encoder.

    python benchmarks/cache.py [--base mini] [--pictures 48] [--rounds 9]

The bare encoder gets pixels that are in memory already, one picture at a time. The cache starts with picture files: it
decodes, scales and crops them, encodes, and writes every entry to an empty folder. ``again`` is the same pictures once
more, from that folder. The three take turns; the share is taken round by round.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdlora.base.checkpoint import find_base
from sdlora.base.encode import encode_pixels
from sdlora.base.fingerprints import vae_fingerprint
from sdlora.base.load import Base, choose_device, load_base
from sdlora.data.buckets import bucket_sizes, place_in_bucket
from sdlora.data.cache import EncodedCache, Job, fill, latent_key
from sdlora.data.cache_files import prune
from sdlora.data.images import open_picture, place
from sdlora.precision import choose_precision
from sdlora.progress import Silence


def write_pictures(folder: Path, count: int, side: int) -> list[Path]:
    """Photograph-like PNGs, 4:3, a half larger than the bucket they go to: smooth fields with some grain."""
    rng = np.random.default_rng(0)
    width, height = side * 2, side * 3 // 2
    files = [folder / f"{number}.png" for number in range(count)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 4, smooth.shape).astype(np.int16)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file)
    return files


def jobs_of(base: Base, files: list[Path]) -> list[Job[torch.Tensor]]:
    sizes, vae, jobs = bucket_sizes(base.checkpoint.resolution, base.checkpoint.size_step), vae_fingerprint(base), []
    for file in files:
        picture = open_picture(file)
        placement = place_in_bucket(*picture.size, sizes)
        key = latent_key(
            pixels=hashlib.sha256(picture.tobytes()).hexdigest(),
            placement=placement,
            flipped=False,
            vae=vae,
            dtype=base.vae.dtype,
            device=base.device,
        )
        jobs.append(Job(key=key, load=lambda file=file, placement=placement: place(open_picture(file), placement)))
    return jobs


def compare(base: Base, folder: Path, pictures: int, rounds: int) -> dict[str, object]:
    jobs = jobs_of(base, write_pictures(folder, pictures, base.checkpoint.resolution))
    cache, in_memory = EncodedCache(folder / "cache", 1e12), [job.load() for job in jobs]

    def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = encode_pixels(base, pixels[None])
        return {"mean": posterior.mean[0], "std": posterior.std[0]}

    def bare() -> None:
        for pixels in in_memory:
            encode(pixels)["mean"].cpu()

    def cached() -> None:
        for _ in fill(cache, jobs, encode, progress=Silence(), task="Encoding"):
            pass

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    bare()
    times: dict[str, list[float]] = {"bare": [], "cached": [], "again": []}
    for _ in range(rounds):
        prune(folder / "cache", 0)
        for name, work in (("bare", bare), ("cached", cached), ("again", cached)):
            times[name].append(seconds(work))
    shares = sorted(one / other for one, other in zip(times["bare"], times["cached"], strict=True))
    return {
        "pixels": list(in_memory[0].shape[1:]),
        "pictures_per_second": {name: round(pictures / statistics.median(own), 1) for name, own in times.items()},
        "cached / bare": [round(share, 3) for share in (statistics.median(shares), shares[0], shares[-1])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    checkpoint, device = find_base(arguments.base), choose_device()
    dtype = choose_precision("auto", device, unet_parameters=checkpoint.unet_parameters)
    base = load_base(checkpoint, device=device, dtype=dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; shares are median [least, most] of {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(base, Path(folder), arguments.pictures, arguments.rounds)))


if __name__ == "__main__":
    main()
