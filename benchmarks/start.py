"""Seconds from ``sdlora train`` to the end of its first step on ``mini``, against another checkout, in turns.

    python benchmarks/start.py [OTHER_CHECKOUT] [--rounds 7] [--without-peft] [--photographs FOLDER]

Each start is a process of its own with a warm cache. ``--without-peft`` hides peft, which a user need not have.
``--photographs`` trains on 24 JPEGs of 12 megapixels, made in FOLDER, in place of the quickstart's small images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
START = """
import sys, time, importlib.abc, importlib.machinery
if sys.argv[1] == "without-peft":
    sys.modules["peft"] = None

class FirstStepFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "sdlora.training.session":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            step = module.TrainingSession.step
            def first_step(self, number):
                step(self, number)
                print("FIRST STEP AT", time.time(), flush=True)
                import os
                os._exit(0)
            module.TrainingSession.step = first_step
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, FirstStepFinder())
arguments = sys.argv[2:]
sys.argv = ["sdlora", *arguments]
from sdlora.cli import main
main()
"""
"""Runs the command and stops it after its first step; what is measured is the command's own code."""


def seconds(checkout: Path, cache: str, peft: str, images: Path | None) -> float:
    environment = os.environ | {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}
    output = Path(cache) / "unwritten.safetensors"
    named = ["configs/quickstart-blueprint.toml"] if images is None else ["--images", str(images), "--trigger", "zorb"]
    arguments = ["train", *named, f"output.path={output}"]
    began = time.time()
    result = subprocess.run(
        [sys.executable, "-c", START, peft, *arguments], cwd=checkout, env=environment, capture_output=True, text=True
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("FIRST STEP AT")]
    if not lines:
        sys.exit(result.stderr)
    return float(lines[0].split()[-1]) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "other", type=Path, nargs="?", help="another checkout of this repository, such as a git worktree"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    sides = {"here": HERE} | ({"other": options.other.resolve()} if options.other else {})
    peft = "without-peft" if options.without_peft else "with-peft"
    images = None
    if options.photographs:
        from lint import make_set

        images = make_set(options.photographs.resolve(), 24, 4000, 3000)
    with tempfile.TemporaryDirectory() as cache:
        for checkout in sides.values():
            seconds(checkout, cache, peft, images)
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, checkout in sides.items():
                times[side].append(seconds(checkout, cache, peft, images))
    for side, found in times.items():
        print(f"{side}: {statistics.median(found):.2f} s [{min(found):.2f}, {max(found):.2f}]")
    if options.other:
        ratios = [ours / other for ours, other in zip(times["here"], times["other"], strict=True)]
        print(f"here / other: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
