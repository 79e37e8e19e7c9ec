"""From a folder of images to a LoRA file: where the time of ``sdlora train`` goes.

    python -m benchmarks.end_to_end [--base mini] [--images FOLDER] [--count 24] [--steps 300] [--rounds 3] [--json]

Each round is two runs of the command, each a process of its own: the first encodes the images, the second finds them in the
cache. ``first step`` is from the start of the process to the end of its first step, ``steps`` the time within steps, and
``rest`` what comes between them and after: checkpoints, losses, the file and its samples. ``share inside steps`` is that of
the time after the first step began.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.turns import conditions, median, print_results, significant

HERE = Path(__file__).resolve().parent.parent
TIMED = """
import json, os, sys, time

from sdlora.training.session import TrainingSession

plain, spans = TrainingSession.step, []

def timed(self, number):
    began = time.time()
    result = plain(self, number)
    if self.base.device.type == "cuda":
        import torch
        torch.cuda.synchronize()
    spans.append((began, time.time()))
    return result

TrainingSession.step = timed
written, *arguments = sys.argv[1:]
sys.argv = ["sdlora", *arguments]
from sdlora.cli import main
try:
    main()
finally:
    with open(written, "w", encoding="utf-8") as file:
        json.dump(spans, file)
"""
"""Runs the command and writes when each step began and ended; what is measured is the command's own code."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Seconds of one run of the command."""

    began: float
    """When the process started."""
    steps: Sequence[tuple[float, float]]
    """When each step began and ended."""
    ended: float

    @property
    def columns(self) -> dict[str, float]:
        """What the table shows."""
        first, inside = self.steps[0], sum(end - begin for begin, end in self.steps)
        after = self.ended - first[0]
        return {
            "first step, s": first[1] - self.began,
            "steps, s": inside,
            "rest, s": after - inside,
            "total, s": self.ended - self.began,
            "share inside steps": inside / after,
        }


def run_command(arguments: Sequence[str], folder: Path) -> Run:
    """``sdlora train`` with ``arguments``; ends the benchmark with its message where it fails."""
    spans = folder / "spans.json"
    environment = os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    began = time.time()
    command = [sys.executable, "-c", TIMED, str(spans), "train", *arguments]
    result = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    ended = time.time()
    if result.returncode:
        sys.exit(result.stderr)
    return Run(began=began, steps=json.loads(spans.read_text(encoding="utf-8")), ended=ended)


def sample_images(source: Path, target: Path, count: int) -> Path:
    """``count`` images of a folder with their captions."""
    target.mkdir()
    images = sorted(file for file in source.iterdir() if file.suffix in (".png", ".jpg", ".jpeg", ".webp"))
    if len(images) < count:
        sys.exit(f"{source}: {len(images)} images; at least {count} are needed")
    for image in images[:count]:
        shutil.copy(image, target)
        if (caption := image.with_suffix(".txt")).exists():
            shutil.copy(caption, target)
    return target


def compare(images: Path, settings: Sequence[str], *, rounds: int) -> list[dict[str, Any]]:
    """The table."""
    found: Mapping[str, list[dict[str, float]]] = {"empty": [], "filled": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cache = f"cache.folder={json.dumps(str(folder / 'cache'))}"
            for state, columns in found.items():
                output = f"output.path={json.dumps(str(folder / state / 'lora.safetensors'))}"
                named = ["--images", str(images), "--trigger", "zorb", cache, output, *settings]
                columns.append(run_command(named, folder).columns)
    return [
        {
            "cache": state,
            **{name: median([each[name] for each in columns]) for name in columns[0]},
            "share inside steps": _spread([each["share inside steps"] for each in columns]),
        }
        for state, columns in found.items()
    ]


def _spread(values: Sequence[float]) -> list[float]:
    return [significant(value) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--images", type=Path, default=HERE / "datasets" / "blueprint")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = sample_images(options.images, Path(folder) / "images", options.count)
        settings = ["--base", options.base, "--steps", str(options.steps)]
        rows = compare(images, settings, rounds=options.rounds)
    stated = conditions(base=options.base, images=options.count, steps=options.steps, rounds=options.rounds)
    print_results(stated, rows, as_json=options.json)


if __name__ == "__main__":
    main()
