"""Images a second, against diffusers' pipeline on the same models, with the same sampler, guidance, steps and dtype.

    python -m benchmarks.generate [--base mini | sd1 | FILE] [--precision bfloat16] [--batches 1 4] [--rounds 5] [--json]

Both sides hold the very same models in memory and start from the same noise, so that they make the same images. A round is
one batch, from the prompts to images in memory, without loading. ``sd1`` is a model of the published size with random
weights. LoRAs are not in it: merged, they cost neither side anything in a step (``benchmarks.stack``).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.random_weights import fill_base_randomly
from benchmarks.turns import conditions, in_turn, median, print_results, ratio, seconds, significant
from sdlora.base.base import Base
from sdlora.base.checkpoint import find_base
from sdlora.base.load import load_base
from sdlora.base.precision import choose_device, choose_precision
from sdlora.generation.request import ImageRequest
from sdlora.generation.samplers import SAMPLERS
from sdlora.generation.schedulers import make_scheduler
from sdlora.generation.studio import Studio
from sdlora.progress import Silence
from tests.real_size import write_hollow_checkpoint

PROMPT = "blupaper, a red fox"
Draw = Callable[[], list[Image.Image]]


def open_base(name: str, precision: str, folder: Path) -> Base:
    """``mini``, a checkpoint, or one of the published sizes with random weights, made in the device's memory."""
    path = write_hollow_checkpoint(folder / "hollow.safetensors", name) if name == "sd1" else name
    checkpoint, device = find_base(str(path)), choose_device()
    dtype = choose_precision(precision, device, unet_parameters=checkpoint.unet_parameters, generating=True)
    base = load_base(checkpoint, device=device, dtype=dtype)
    if name == "sd1":
        fill_base_randomly(base)
    return base


def our_side(base: Base, requests: list[ImageRequest]) -> Draw:
    studio, silence = Studio(base=base, loras=()), Silence()
    return lambda: [each.image for each in studio.images(requests, progress=silence)]


def diffusers_side(base: Base, requests: list[ImageRequest]) -> Draw:
    first, (encoder,) = requests[0], base.text_encoders
    pipe: Any = StableDiffusionPipeline(
        unet=base.unet,
        vae=base.vae,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        scheduler=make_scheduler(SAMPLERS[first.sampler], base.checkpoint.schedule, first.steps),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    width, height = first.size_on(base.checkpoint)

    def draw() -> list[Image.Image]:
        return pipe(
            [request.prompt for request in requests],
            negative_prompt=[request.negative for request in requests],
            num_inference_steps=first.steps,
            guidance_scale=first.cfg,
            width=width,
            height=height,
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        ).images

    return draw


def sides_of(base: Base, *, batch: int, steps: int, sampler: str, size: int | None) -> dict[str, Draw]:
    requests = [
        ImageRequest(
            prompt=PROMPT, seed=seed, steps=steps, sampler=sampler, size=None if size is None else (size, size)
        )
        for seed in range(batch)
    ]
    return {"sdlora": our_side(base, requests), "diffusers": diffusers_side(base, requests)}


def compare(base: Base, *, batch: int, steps: int, sampler: str, size: int | None, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    sides = sides_of(base, batch=batch, steps=steps, sampler=sampler, size=size)
    times = in_turn({name: partial(seconds, draw) for name, draw in sides.items()}, rounds)
    return {
        "batch": batch,
        "resolution": size or base.checkpoint.resolution,
        "dtype": str(base.dtype).removeprefix("torch."),
        **{f"{name}, images/s": significant(batch / median(took)) for name, took in times.items()},
        "diffusers / sdlora, time": ratio(times, "diffusers", "sdlora"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--sampler", choices=SAMPLERS, default=ImageRequest.sampler)
    parser.add_argument("--steps", type=int, default=ImageRequest.steps)
    parser.add_argument("--size", type=int, help="side of the image in pixels; by default the base's own")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    stated = conditions(base=options.base, sampler=options.sampler, steps=options.steps, rounds=options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        base = open_base(options.base, options.precision, Path(folder))
        rows = [
            compare(
                base,
                batch=batch,
                steps=options.steps,
                sampler=options.sampler,
                size=options.size,
                rounds=options.rounds,
            )
            for batch in options.batches
        ]
    print_results(stated, rows, as_json=options.json)


if __name__ == "__main__":
    main()
