"""Speed of encoding a folder of images into the cache, as a share of the speed of the bare VAE encoder.

    python benchmarks/cache.py [--base mini] [--images datasets] [--rounds 15]

The bare encoder gets pixels that are already in memory, one image at a time. The cache starts from image files: it
decodes, scales and crops them, encodes them, and writes every entry to an empty folder. ``again`` reads the same images
from that folder. The three take turns; the share is computed for each round.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sdlora.base.base import Base
from sdlora.base.load import load_base
from sdlora.base.precision import choose_device, choose_precision
from sdlora.cache.entries import prune
from sdlora.cache.filling import Job, fill
from sdlora.cache.store import EncodedCache
from sdlora.config.loading import load_config
from sdlora.progress import Silence
from sdlora.training.latents import encode_crop, encoders_for, latent_jobs
from sdlora.training.plan import RunPlan, plan_config


def compare(base: Base, plan: RunPlan, folder: Path, rounds: int) -> dict[str, object]:
    views = [view for shown in plan.training.shown for view in shown.all()]
    encode, cache = partial(encode_crop, base), EncodedCache(folder, 1e12)

    def jobs() -> list[Job[np.ndarray]]:
        """New ones for each round, since they keep images that they have opened."""
        return latent_jobs(base, plan.items, views, plan.config, plan.kept)

    in_memory = [job.load() for job in jobs()]

    def bare() -> None:
        for pixels in in_memory:
            encode(pixels)["mean"].cpu()

    def cached(round_jobs: list[Job[np.ndarray]]) -> None:
        for _ in fill(cache, round_jobs, encode, progress=Silence(), task="", encoders=encoders_for(base, views)):
            pass

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    bare()
    times: dict[str, list[float]] = {"bare": [], "cached": [], "again": []}
    for _ in range(rounds):
        prune(folder, 0)
        first, second = partial(cached, jobs()), partial(cached, jobs())
        for name, work in (("bare", bare), ("cached", first), ("again", second)):
            times[name].append(seconds(work))
    shares = sorted(
        bare_time / cached_time for bare_time, cached_time in zip(times["bare"], times["cached"], strict=True)
    )
    return {
        "images": len(views),
        "pixels": sorted({pixels.shape[:2] for pixels in in_memory}),
        "images_per_second": {name: round(len(views) / statistics.median(spent), 1) for name, spent in times.items()},
        "cached / bare": [round(share, 3) for share in (statistics.median(shares), shares[0], shares[-1])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--images", default="datasets")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    values = [f"base.path={json.dumps(arguments.base)}", f"data.images={json.dumps(arguments.images)}"]
    values += ["data.allow_missing_captions=true"]
    plan = plan_config(load_config("configs/quickstart-blueprint.toml", values))
    checkpoint, device = plan.base, choose_device()
    dtype = choose_precision("auto", device, unet_parameters=checkpoint.unet_parameters)
    base = load_base(checkpoint, device=device, dtype=dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; shares are median [min, max] of {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(base, plan, Path(folder), arguments.rounds)))


if __name__ == "__main__":
    main()
