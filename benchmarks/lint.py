"""Time and memory of ``sdlora lint``: 100 images of 12 megapixels, and 10,000 of 256 x 256.

    python benchmarks/lint.py FOLDER

The images are made in FOLDER (some 700 MB) where they are not there yet. Each measurement is the whole command in a
separate process, including its start: wall-clock seconds, and the largest resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image


def image(number: int, width: int, height: int) -> Image.Image:
    """Colours that change smoothly under the grain of a photograph, others for each ``number``."""
    rng = np.random.default_rng(number)
    colours = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = colours.resize((width, height), Image.Resampling.BICUBIC)
    grain = Image.fromarray(rng.normal(128, 24, (512, 512)).clip(0, 255).astype(np.uint8))
    textured = Image.new("L", (width, height))
    for left in range(0, width, 512):
        for top in range(0, height, 512):
            textured.paste(grain, (left, top))
    return Image.blend(smooth, textured.convert("RGB"), 0.25)


def make_set(folder: Path, count: int, width: int, height: int) -> Path:
    """``count`` JPEGs with captions, those that are there already left as they are."""
    folder.mkdir(parents=True, exist_ok=True)

    def make(number: int) -> None:
        file = folder / f"{number:05}.jpg"
        if not file.exists():
            part = file.with_suffix(".part")
            image(number, width, height).save(part, "JPEG", quality=92)
            file.with_suffix(".txt").write_text(f"zorb, a thing of kind {number}")
            part.rename(file)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, range(count)))
    return folder


def measure(folder: Path) -> dict[str, float | int]:
    """Lint ``folder`` once."""
    began = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "sdlora.cli",
        "lint",
        str(folder),
        "--trigger",
        "zorb",
        "--resolution",
        "256",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    assert os.waitstatus_to_exitcode(status) == 0, answer["findings"][:5]
    return {
        "images": answer["images"],
        "seconds": round(seconds, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "megabytes": round(usage.ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of this many is printed")
    arguments = parser.parse_args()
    sets = {
        "100 of 12 megapixels": make_set(arguments.folder / "large", 100, 4000, 3000),
        "10,000 of 256 x 256": make_set(arguments.folder / "small", 10_000, 256, 256),
    }
    for title, folder in sets.items():
        best = min((measure(folder) for _ in range(arguments.rounds)), key=lambda measured: measured["seconds"])
        print(json.dumps({"set": title, "cores": os.cpu_count(), **best}))


if __name__ == "__main__":
    main()
