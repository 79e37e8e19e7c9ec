"""Reading LoRA files: an SDXL file of rank 32 into checked, named changes, and the metadata of a thousand files.

    python -m benchmarks.lora_files [--folder out/lora-files]

Writes the files (about 0.7 GB) where they are not there yet. For each, in turn and from a warm cache, the median of several:

- ``bytes``: ``Path.read_bytes``;
- ``safetensors``: ``load_file``, and each tensor copied, as it maps the file and reads nothing before;
- ``sdlora``: ``read_lora``, which looks at every number, and ``resolve`` against SDXL's modules.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.kohya_modules import KOHYA_DEFAULT
from sdlora.families import SDXL
from sdlora.formats.keys import resolve
from sdlora.formats.lora_file import read_lora
from sdlora.formats.lora_writer import write_lora
from sdlora.formats.metadata_file import read_metadata
from sdlora.formats.published import published_modules
from sdlora.lora.low_rank import LowRank

ROUNDS, FILES = 9, 1000


def write_file(file: Path, dtype: torch.dtype, rank: int, count: int | None = None) -> None:
    names = [(n, s) for n, s in published_modules("sdxl").items() if re.search(KOHYA_DEFAULT, n)][:count]
    changes = {
        name: LowRank(down=torch.randn(rank, shape[1]), up=torch.randn(shape[0], rank), alpha=rank / 2)
        for name, shape in names
    }
    stated = {"ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": json.dumps({"a": {"tag": 1}})}
    write_lora(file, changes, stated, dtype=dtype, family=SDXL, base_modules=published_modules("sdxl"))


def in_turn(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each side, after one round that warms the cache."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/lora-files"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    modules = published_modules("sdxl")
    for dtype in (torch.float16, torch.float32):
        file = folder / f"sdxl-32-{str(dtype).removeprefix('torch.')}.safetensors"
        if not file.exists():
            write_file(file, dtype, 32)
        took = in_turn(
            {
                "bytes": file.read_bytes,
                "safetensors": lambda file=file: [tensor.clone() for tensor in load_file(file).values()],
                "sdlora": lambda file=file: resolve(read_lora(file).modules, modules),
            }
        )
        ratios = ", ".join(f"{took['sdlora'] / took[side]:.2f} of {side}" for side in ("bytes", "safetensors"))
        times = ", ".join(f"{side} {value * 1000:.0f} ms" for side, value in took.items())
        print(f"{file.name}, {file.stat().st_size / 1e6:.0f} MB: {times}; sdlora takes {ratios}", flush=True)
    many = folder / "many"
    many.mkdir(exist_ok=True)
    for number in range(FILES):
        if not (many / f"{number}.safetensors").exists():
            if number == 0:
                write_file(many / "0.safetensors", torch.float16, 1, 40)
            else:
                (many / f"{number}.safetensors").write_bytes((many / "0.safetensors").read_bytes())
    took = in_turn({"metadata": lambda: [read_metadata(many / f"{number}.safetensors") for number in range(FILES)]})
    print(f"metadata of {FILES} files: {took['metadata']:.2f} s")


if __name__ == "__main__":
    main()
