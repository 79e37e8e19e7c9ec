"""Baking a LoRA into a checkpoint, against copying the checkpoint.

    python -m benchmarks.bake [--family sdxl] [--folder out/real-size] [--rank 32] [--rounds 3] [--json]

A single file of the published size in float16, that of ``benchmarks.real_size``, written where it is not there yet, and a
LoRA on every linear layer of the UNet's attention blocks, as kohya's trainer has it by default. ``copy`` is
``shutil.copyfile`` and ``bake`` is ``sdlora.bake``; each writes a new file, and is done when that is on the disk.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.real_size import write_checkpoint
from benchmarks.stack import write_files
from benchmarks.turns import conditions, in_turn, median, print_results, ratio, seconds, significant
from sdlora.families import FAMILIES
from sdlora.progress import Silence
from sdlora.tools.bake import bake
from tests.published import published


def timed(write: Callable[[Path], object], target: Path) -> float:
    """Seconds until a new file is on the disk."""
    target.unlink(missing_ok=True)
    os.sync()

    def work() -> None:
        write(target)
        with target.open("rb") as written:
            os.fsync(written.fileno())

    took = seconds(work)
    target.unlink()
    return took


def compare(base: Path, lora: Path, *, rounds: int) -> dict[str, object]:
    """The row of the table; the files are written beside ``base`` and removed."""
    target = base.with_name("baked.safetensors")
    sides = {
        "copy": partial(timed, partial(shutil.copyfile, base), target),
        "bake": partial(timed, partial(bake, base, str(lora), progress=Silence()), target),
    }
    times = in_turn(sides, rounds)
    medians = {f"{side}, s": significant(median(values)) for side, values in times.items()}
    return {**medians, "bake / copy": ratio(times, "bake", "copy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="sdxl", choices=["sd1", "sdxl"])
    parser.add_argument("--folder", type=Path, default=Path("out/real-size"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    base = arguments.folder / f"{arguments.family}.safetensors"
    if not base.exists():
        write_checkpoint(base, arguments.family)
    unet = published(arguments.family)["unet"]
    (lora,) = write_files(arguments.folder, unet, FAMILIES[arguments.family], rank=arguments.rank, count=1)
    stated = conditions(gigabytes=significant(base.stat().st_size / 1e9), rank=arguments.rank, rounds=arguments.rounds)
    print_results(stated, [compare(base, lora, rounds=arguments.rounds)], as_json=arguments.json)


if __name__ == "__main__":
    main()
