"""What grows, and how: the cost against the number of images, of LoRAs stacked, and the rank, on ``mini``.

    python -m benchmarks.growth [--images 10 100 1000] [--loras 1 8 64] [--ranks 1 8 32 128] [--rounds 5] [--json]

- images: examining and planning a folder of small images (``plan_config``), and the step after it;
- LoRAs: putting rank-8 LoRAs on the weights, and the UNet's forward with them;
- ranks: a training step of one image, attention.

Ratios are over the first of each list, round by round.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from benchmarks.turns import conditions, in_turn, median, print_results, ratio, seconds
from sdlora.base.base import Base
from sdlora.base.checkpoint import find_base
from sdlora.base.load import load_base
from sdlora.config.loading import load_config
from sdlora.lora.low_rank import LowRank
from sdlora.lora.stack import Stack
from sdlora.lora.targets import ATTENTION
from sdlora.progress import Silence
from sdlora.training.plan import RunPlan, plan_config
from sdlora.training.session import TrainingSession, open_session

STEPS_A_TURN, STACKED_RANK = 2, 8


def write_images(folder: Path, count: int, side: int) -> Path:
    """Images that are all different, with captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"zorb, a thing of kind {number}", encoding="utf-8")
    return folder


def planned(images: Path, base: str, *settings: str) -> RunPlan:
    """A run of one image in a step on ``images``."""
    cache = f"cache.folder={json.dumps(str(images.parent / 'cache'))}"
    stated = [f"data.images={json.dumps(str(images))}", "data.trigger=zorb", f"base.path={json.dumps(base)}"]
    output = f"output.path={json.dumps(str(images.parent / 'x.safetensors'))}"
    plain = ["train.batch_size=1", "train.micro_batch=1", "train.steps=100000", "lora.targets=attention"]
    return plan_config(load_config(None, [*stated, output, cache, *plain, *settings]))


def opened(plan: RunPlan) -> TrainingSession:
    """A session with its layers in place."""
    base = load_base(plan.base, device=Accelerator().device, dtype=torch.float32)
    session = open_session(plan, base, Accelerator(), Silence())
    session.adapter.attach(base.modules())
    return session


def steps_of(session: TrainingSession) -> Callable[[], float]:
    """Seconds of a step, on average over a few."""
    numbers = itertools.count()

    def some() -> None:
        for _ in range(STEPS_A_TURN):
            session.step(next(numbers))

    return lambda: seconds(some) / STEPS_A_TURN


def rows_of(what: str, times: dict[str, list[float]], unit: str) -> list[dict[str, Any]]:
    """A row for each side, with its ratio over the first."""
    first = next(iter(times))
    return [
        {"what": what, unit: side, "seconds": median(took), "over the first": ratio(times, side, first)}
        for side, took in times.items()
    ]


def by_images(folder: Path, base: str, counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    side = find_base(base).resolution
    folders = {count: write_images(folder / f"{count}" / "images", count, side) for count in counts}
    planning = {str(n): partial(seconds, partial(planned, images, base)) for n, images in folders.items()}
    rows = rows_of("plan", in_turn(planning, rounds), "count")
    steps = {str(count): steps_of(opened(planned(images, base))) for count, images in folders.items()}
    return [*rows, *rows_of("step", in_turn(steps, rounds), "count")]


@torch.no_grad()
def by_loras(base: Base, counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    chosen = {
        name: shape
        for name, shape in base.checkpoint.module_shapes().items()
        if name.startswith("unet.") and name.endswith(ATTENTION)
    }

    def lora() -> dict[str, tuple[LowRank, float]]:
        pairs = {n: (torch.randn(STACKED_RANK, s[1]), torch.randn(s[0], STACKED_RANK)) for n, s in chosen.items()}
        return {n: (LowRank(down=down, up=up * 1e-3, alpha=8.0), 0.5) for n, (down, up) in pairs.items()}

    loras, stack = [lora() for _ in range(max(counts))], Stack(base.modules())
    size = base.checkpoint.resolution // base.checkpoint.latent_factor
    latents, text = torch.randn(2, 4, size, size), torch.randn(2, 77, base.unet.config["cross_attention_dim"])
    place = {"device": base.device, "dtype": base.dtype}
    latents, text = latents.to(**place), text.to(**place)
    forwards: dict[str, list[float]] = {str(count): [] for count in counts}

    def stacked(count: int) -> float:
        took = seconds(lambda: stack.set(loras[:count]))
        forwards[str(count)].append(seconds(lambda: base.unet(latents, 500, text)))
        stack.restore()
        return took

    times = in_turn({str(count): partial(stacked, count) for count in counts}, rounds)
    steps = {name: took[-rounds:] for name, took in forwards.items()}
    return [*rows_of("stack", times, "count"), *rows_of("forward", steps, "count")]


def by_ranks(folder: Path, base: str, ranks: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    images = write_images(folder / "ranks" / "images", 4, find_base(base).resolution)
    sides = {str(rank): steps_of(opened(planned(images, base, f"lora.rank={rank}"))) for rank in ranks}
    return rows_of("step", in_turn(sides, rounds), "rank")


def measure(
    folder: Path, base: str, *, images: Sequence[int], loras: Sequence[int], ranks: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """The table."""
    torch.manual_seed(0)
    rows = by_images(folder, base, images, rounds)
    loaded = load_base(find_base(base), device=Accelerator().device, dtype=torch.float32)
    rows += by_loras(loaded, loras, rounds)
    return rows + by_ranks(folder, base, ranks, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--loras", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(
            Path(folder),
            "mini",
            images=options.images,
            loras=options.loras,
            ranks=options.ranks,
            rounds=options.rounds,
        )
    print_results(conditions(base="mini", rounds=options.rounds), rows, as_json=options.json)


if __name__ == "__main__":
    main()
