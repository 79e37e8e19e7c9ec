"""Listing LoRAs: a thousand files for the first time and from the index, and a hundred thousand from the index.

    python benchmarks/library.py [--folder out/library-bench] [--many 100000]

Writes files with the headers of real ones and no numbers: the tables of tensors of Stable Diffusion 1.x and SDXL as kohya's
trainer writes them (792 and 2,166 tensors), at many ranks, with tags of a hundred captions. Their payload is a hole in the
file, which takes no room on most disks. Every listing is a process of its own, from start to end; the files are in the
cache of the operating system.

- ``mixed``: 1,000 files of 40 layouts (a family, a rank and a choice of modules each), as a collection has them;
- ``all unlike``: 1,000 files of SD 1.x, no two of one layout, so that each table is parsed;
- ``many``: those of ``mixed`` under many names each (hard links), so that they take no room of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES, LAYOUTS, ROUNDS = 1000, 40, 3


def kohya_tables() -> dict[str, list[tuple[str, int, int]]]:
    """Family -> (key, inputs, outputs) of the modules that kohya's trainer changes."""
    import re

    from benchmarks.kohya_modules import KOHYA_DEFAULT
    from sdlora.families import FAMILIES
    from sdlora.formats.keys import kohya_keys
    from sdlora.formats.published import published_modules

    found = {}
    for name in ("sd1", "sdxl"):
        modules = published_modules(name)
        chosen = {module: shape for module, shape in modules.items() if re.search(KOHYA_DEFAULT, module)}
        keys = kohya_keys(chosen, FAMILIES[name], modules)
        found[name] = [(keys[module], shape[1], shape[0]) for module, shape in chosen.items()]
    return found


def header(modules: list[tuple[str, int, int]], rank: int, metadata: dict[str, str]) -> tuple[bytes, int]:
    """The bytes before the tensors, and the size of the tensors."""
    table: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for key, inputs, outputs in modules:
        for name, shape in (("alpha", []), ("lora_down.weight", [rank, inputs]), ("lora_up.weight", [outputs, rank])):
            size = 2
            for extent in shape:
                size *= extent
            table[f"{key}.{name}"] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position + size]}
            position += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, position


def write_files(folder: Path, count: int, *, layouts: int, families: tuple[str, ...]) -> None:
    if (folder / f"{count - 1:06}.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    modules = kohya_tables()
    tags = json.dumps({"10_style": {f"tag number {number}": 100 - number % 90 for number in range(200)}})
    for number in range(count):
        layout = number % layouts
        family = families[layout % len(families)]
        some = modules[family][layout // 128 :]
        stated = {
            "ss_base_model_version": "sd_v1" if family == "sd1" else "sdxl_base_v1-0",
            "ss_output_name": f"style-{number}",
            "ss_tag_frequency": tags,
            "modelspec.trigger_phrase": f"trigger{number}",
            "sshs_model_hash": f"{number:064x}",
        }
        start, size = header(some, 1 + layout % 128, stated)
        with (folder / f"{number:06}.safetensors").open("wb") as file:
            file.write(start)
            file.truncate(len(start) + size)


def link_files(folder: Path, count: int, originals: Path) -> None:
    """``count`` names for the files in ``originals``."""
    if (folder / f"{count - 1:06}.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        os.link(originals / f"{number % FILES:06}.safetensors", folder / f"{number:06}.safetensors")


@dataclass(frozen=True)
class Took:
    """Seconds of a process: from start to end, and of the processor."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.cpu:.2f} s of a core)"


def timed(folder: Path, cache: Path, *options: str) -> Took:
    """``sdlora list`` as a process of its own."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "sdlora.cli", "list", str(folder), *options]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(wall=time.perf_counter() - began, cpu=cpu)


def best(folder: Path, cache: Path, *options: str, cold: bool = False, rounds: int = ROUNDS) -> Took:
    """The quickest of several, which other work on the machine disturbed least."""
    taken = []
    for _ in range(rounds):
        if cold:
            (cache / "sdlora" / "library" / "index.sqlite").unlink(missing_ok=True)
        taken.append(timed(folder, cache, *options))
    return min(taken, key=lambda took: took.cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/library-bench"))
    parser.add_argument("--many", type=int, default=100_000)
    given = parser.parse_args()
    cache = given.folder / "cache"
    print(f"sdlora list --help: {best(given.folder, cache, '--help')}")
    mixed, unlike, many = (given.folder / name for name in ("mixed", "all-unlike", "many"))
    write_files(mixed, FILES, layouts=LAYOUTS, families=("sd1", "sdxl"))
    write_files(unlike, FILES, layouts=FILES, families=("sd1",))
    link_files(many, given.many, mixed)
    for folder, count, rounds in ((mixed, FILES, ROUNDS), (unlike, FILES, ROUNDS), (many, given.many, 1)):
        if folder != many:  # The headers of its files were read before, by other names.
            timed(folder, cache)
        first = best(folder, cache, cold=True, rounds=rounds)
        again, search = best(folder, cache), best(folder, cache, "--search", f"trigger{FILES - 1}")
        print(f"{folder.name}, {count:,} files: first {first}, from the index {again}, a search {search}", flush=True)


if __name__ == "__main__":
    main()
