"""Checkpoints of real size: how fast they load, and what three training steps and two sampling steps cost.

    python -m benchmarks.real_size [--folder out/real-size] [--families sd1 sdxl] [--resolutions 512]

Writes single files of Stable Diffusion 1.5's and SDXL's size in float16, with random weights, where they are not there
yet (2.1 and 6.9 GB). Then, each in a process of its own so that peaks do not mix:

- ``load``: reading the file's bytes (``Path.read_bytes``) and loading it as a base, in turn, from a warm cache;
- ``memory``: the growth of the process while it loads, over the bytes of the tensors that stay;
- ``train``: 3 steps, batch 1, rank 16, attention, frozen text encoder; ``generate``: 2 steps with guidance.

Memory is the process's largest resident set, and on a GPU the most that torch allocated there.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from sdlora.base.checkpoint import find_base
from sdlora.base.detect import detect_checkpoint
from sdlora.base.load import load_base
from sdlora.base.precision import choose_device, choose_precision
from sdlora.config.loading import load_config
from sdlora.families import FAMILIES
from sdlora.generation.generate import generate
from sdlora.training.run import train
from tests.published import our_names, published
from tests.single_file import ldm_tensors


def write_checkpoint(file: Path, family: str) -> None:
    """Random weights of the size that keeps activations about 1: std 1/√inputs; norms at 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 24, generator=generator)

    def random(name: str, like: torch.Tensor) -> torch.Tensor:
        if like.ndim == 1:
            value = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            return torch.full(like.shape, value, dtype=torch.float16)
        spread = 0.02 if "embedding" in name else like[0].numel() ** -0.5
        repeated = pool.repeat(-(-like.numel() // pool.numel()))[: like.numel()]
        return (repeated * spread).half().view(like.shape)

    parts = {
        part: {name: random(name, tensor) for name, tensor in our_names(part, model).items()}
        for part, model in published(family).items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in ldm_tensors(parts, FAMILIES[family]).items()}, file)


def measure_read(file: Path, _: int) -> dict[str, object]:
    began = time.perf_counter()
    data = file.read_bytes()
    return {"seconds": time.perf_counter() - began, "bytes": len(data)}


def measure_load(file: Path, _: int) -> dict[str, object]:
    sniffs = []
    for _round in range(ROUNDS):
        began = time.perf_counter()
        detect_checkpoint(file)
        sniffs.append(time.perf_counter() - began)
    device = choose_device()
    checkpoint = find_base(str(file))
    dtype = choose_precision("auto", device, unet_parameters=checkpoint.unet_parameters)
    began = time.perf_counter()
    load_base(checkpoint, device=device, dtype=dtype)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - began, "sniff_ms": 1000 * statistics.median(sniffs), "dtype": str(dtype)}


def measure_memory(file: Path, _: int) -> dict[str, object]:
    device = choose_device()
    checkpoint = find_base(str(file))
    dtype = choose_precision("auto", device, unet_parameters=checkpoint.unet_parameters)
    before = resident()
    base = load_base(checkpoint, device=device, dtype=dtype)
    models = (base.unet, base.vae, *(encoder.model for encoder in base.text_encoders))
    stays = sum(p.nbytes for model in models for p in model.parameters())
    return {"stays_gb": round(stays / 1e9, 3), "peak above start / stays": round((resident() - before) / stays, 3)}


def measure_train(file: Path, resolution: int) -> dict[str, object]:
    folder = file.parent / "images"
    folder.mkdir(exist_ok=True)
    Image.effect_noise((resolution, resolution), 60).convert("RGB").save(folder / "one.png")
    (folder / "one.txt").write_text("a thing", encoding="utf-8")
    values = {
        "base.path": file, "data.images": folder, "data.trigger": "zorb", "data.resolution": resolution,
        "output.path": file.with_suffix(".lora.safetensors"), "samples.prompts": [], "train.steps": 3,
        "train.batch_size": 1, "optimizer.text_encoder_learning_rate": 0.0, "optimizer.warmup_steps": 0,
    }  # fmt: skip
    began = time.perf_counter()
    report = train(load_config(None, [f"{key}={value}" for key, value in values.items()]), restart=True)
    return {"seconds": round(time.perf_counter() - began, 1), "loss": report.result.loss}


def measure_generate(file: Path, resolution: int) -> dict[str, object]:
    began = time.perf_counter()
    lora = file.with_suffix(".lora.safetensors")
    image = generate("zorb, a thing", base=str(file), loras=[str(lora)], steps=2, size=(resolution, resolution))[0]
    return {"seconds": round(time.perf_counter() - began, 1), "spread": round(image.latents.std().item(), 3)}


def resident() -> int:
    """Largest resident set of this process so far, in bytes. (``ru_maxrss`` would be the parent's where that was larger.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


MEASURES = {
    "read": measure_read,
    "load": measure_load,
    "memory": measure_memory,
    "train": measure_train,
    "generate": measure_generate,
}
ROUNDS = 5


def measure_here(what: str, file: Path, resolution: int) -> None:
    result = MEASURES[what](file, resolution)
    result["peak_gb"] = round(resident() / 1e9, 2)
    if torch.cuda.is_available():
        result["gpu_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(json.dumps(result))


def measure_apart(what: str, file: Path, resolution: int = 0) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.real_size", "--here", what, str(file), str(resolution)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-500:]}


def compare_load(file: Path) -> dict[str, object]:
    """Reading the bytes and loading the base in turn."""
    measure_apart("read", file)
    rounds = [(measure_apart("read", file), measure_apart("load", file)) for _ in range(ROUNDS)]
    ratios = sorted(load["seconds"] / read["seconds"] for read, load in rounds)
    return {
        "dtype": rounds[0][1]["dtype"],
        "sniff_ms": round(statistics.median(load["sniff_ms"] for _, load in rounds), 1),
        "read_s": round(statistics.median(read["seconds"] for read, _ in rounds), 2),
        "load_s": round(statistics.median(load["seconds"] for _, load in rounds), 2),
        "load / read": [round(r, 2) for r in (statistics.median(ratios), ratios[0], ratios[-1])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/real-size"))
    parser.add_argument("--families", nargs="+", default=["sd1", "sdxl"], choices=list(FAMILIES))
    parser.add_argument("--resolutions", type=int, nargs="+", help="default: 512, and what the family is made for")
    parser.add_argument("--measures", nargs="+", default=list(MEASURES)[1:], choices=list(MEASURES)[1:])
    parser.add_argument("--here", nargs=3, metavar=("WHAT", "FILE", "RESOLUTION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        measure_here(arguments.here[0], Path(arguments.here[1]), int(arguments.here[2]))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}", flush=True)
    for family in arguments.families:
        file = arguments.folder / f"{family}.safetensors"
        if not file.exists():
            write_checkpoint(file, family)
        size = f"{family} {file.stat().st_size / 1e9:.2f} GB"
        if "load" in arguments.measures:
            print(f"{size}, load: {json.dumps(compare_load(file))}", flush=True)
        if "memory" in arguments.measures:
            print(f"{size}, memory: {json.dumps(measure_apart('memory', file))}", flush=True)
        for what in [measure for measure in ("train", "generate") if measure in arguments.measures]:
            for resolution in arguments.resolutions or sorted({512, FAMILIES[family].resolution}):
                result = measure_apart(what, file, resolution)
                print(f"{size}, {what} at {resolution}²: {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
