"""Trainings on ``mini``, compared: presets, the diffusers example, ranks and full fine-tuning, forgetting.

    python -m benchmarks.recipes out/recipes [--parts preset same ranks forgetting] [--sets blueprint pixel]
                                 [--seeds 0 1 2] [--steps 100] [--rank 8] [--only NAME ...] [--json] [--table]

Each run's result is a line of ``FOLDER/results.jsonl``, so the command goes on where it was interrupted; ``--table`` only
prints what is there. 30 images of each set are trained on and 6 are held out. Of every run:

- the held-out loss: mean squared error of the prediction on the held-out images, at 8 noise levels, with the same noise in
  every run, and the mean of its ratio to the reference variant's with the same set and seed;
- 12 images of subjects that no set shows, at weight 1.0: the style's measure, the share of images on the style's side of
  its threshold, and the share whose nearest reference shows the subject, as in ``tests/test_style.py``;
- the neutral loss: that of images that the base itself draws for captions without a trigger word.

Numbers are means ± half of the 95 % interval (Student's t) over the runs of a variant, which are sets times seeds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from sdlora.base.base import Base
from sdlora.base.checkpoint import find_base
from sdlora.base.load import load_base
from sdlora.errors import ConfigError
from tests.measures import TRIGGERS

from .measuring import level_losses, neutral_losses, neutral_measures, style_measures
from .results import Result, append, as_json, as_text, read, rows
from .samples import Sizes, held_out, split
from .training import config_of, train_variant
from .variants import PARTS, REFERENCE, Variant


def conditions(variant: Variant, arguments: argparse.Namespace) -> str:
    """What a result depends on, besides its set and its seed."""
    stated = (*variant.stated(arguments.rank), variant.how, variant.learning_rate, variant.averaged)
    return (
        f"steps {arguments.steps}, rank {arguments.rank}, {arguments.subjects} subjects, {arguments.image_steps} sampler "
        f"steps, {'neutral images, ' if variant.neutral_images else ''}{' '.join(map(str, stated))}"
    )


def measure(base: Base, variant: Variant, style: str, seed: int, arguments: argparse.Namespace) -> Result:
    """Train and measure."""
    sizes = Sizes(subjects=arguments.subjects, image_steps=arguments.image_steps)
    folder: Path = arguments.folder
    config = config_of(variant, style, seed, steps=arguments.steps, rank=arguments.rank, folder=folder)
    began = time.perf_counter()
    trained = train_variant(variant, config, base)
    seconds = time.perf_counter() - began
    measures = style_measures(trained, style, seed, sizes) if sizes.subjects else {}
    if variant.neutral_images and sizes.subjects:
        sheet = folder / "images" / f"{variant.name}-{style}-{seed}.png"
        measures |= neutral_measures(trained, base, style, sizes, sheet)
    return Result(
        name=variant.name,
        style=style,
        seed=seed,
        conditions=conditions(variant, arguments),
        seconds=round(seconds, 1),
        held_out=level_losses(trained, held_out(base, split(style, folder)[1])),
        neutral=neutral_losses(trained, base, sizes) if sizes.subjects else [],
        measures=measures,
    )


def run(variants: Sequence[Variant], arguments: argparse.Namespace, file: Path) -> None:
    """Every run that has no line in ``file`` yet."""
    base = load_base(find_base("mini"), device=torch.device("cpu"), dtype=torch.float32)
    done, unknown = {result.key for result in read(file)}, set()
    for seed in arguments.seeds:
        for style in arguments.sets:
            for variant in variants:
                if (variant.name, style, seed, conditions(variant, arguments)) in done or variant.name in unknown:
                    continue
                try:
                    result = measure(base, variant, style, seed, arguments)
                except ConfigError as error:
                    unknown.add(variant.name)
                    print(f"{variant.name}: left out, since this version does not know it: {error}", file=sys.stderr)
                    continue
                append(file, result)
                done.add(result.key)
                loss = result.value("held-out loss")
                print(
                    f"{variant.name}, {style}, seed {seed}: {loss:.4f}, {result.seconds} s", file=sys.stderr, flush=True
                )


def report(part: str, arguments: argparse.Namespace, file: Path) -> dict[str, object]:
    """The table of a part from the lines in ``file``."""
    variants = PARTS[part]
    keys = {(variant.name, conditions(variant, arguments)) for variant in variants}
    results = [
        result
        for result in read(file)
        if (result.name, result.conditions) in keys
        and result.style in arguments.sets
        and result.seed in arguments.seeds
    ]
    table = rows(results, [variant.name for variant in variants], REFERENCE[part])
    said = (
        f"{part}: mini, {arguments.steps} steps of 4 images, rank {arguments.rank} where none is stated, sets "
        f"{', '.join(arguments.sets)}, seeds {', '.join(map(str, arguments.seeds))}; float32, CPU, torch "
        f"{torch.__version__}; ratios to {REFERENCE[part]}"
    )
    if not arguments.json:
        print(f"\n{said}\n\n{as_text(table)}")
    return {"part": part, "conditions": said, "rows": as_json(table)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for results, and for what is made on the way")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--sets", nargs="+", default=list(TRIGGERS), choices=list(TRIGGERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--subjects", type=int, default=Sizes.subjects, help="0 draws no images, for a quick look")
    parser.add_argument("--image-steps", type=int, default=Sizes.image_steps)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants, by name")
    parser.add_argument("--threads", type=int, help="of torch; results may differ in their last digits")
    parser.add_argument("--table", action="store_true", help="train nothing, and print what has been measured")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.folder = arguments.folder.resolve()
    file = arguments.folder / "results.jsonl"
    # diffusers warns of settings of its own.
    warnings.simplefilter("ignore")
    if not arguments.table:
        variants = [variant for part in arguments.parts for variant in PARTS[part]]
        run([v for v in variants if not arguments.only or v.name in arguments.only], arguments, file)
    reports = [report(part, arguments, file) for part in arguments.parts]
    if arguments.json:
        print(json.dumps(reports))


if __name__ == "__main__":
    main()
