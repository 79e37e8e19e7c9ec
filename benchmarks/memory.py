"""The memory that training and sampling need on a GPU: by arithmetic, and measured where CUDA is at hand.

    python -m benchmarks.memory [--json]

Arithmetic runs the real step on models without memory, so it needs no GPU, no checkpoint and half a minute. What CUDA's
context, the workspace of kernels and gaps in the allocator's memory take is not in it. With CUDA, a step is done there too,
on weights of zeros, and the most that torch allocated is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sdlora.base.checkpoint import BaseCheckpoint, find_base
from sdlora.base.device_memory import move_to
from sdlora.base.load import load_base
from sdlora.config.loading import load_config
from sdlora.config.sections import Config
from sdlora.training.memory import META, stand_in_loss, step_memory
from sdlora.training.new_adapter import new_adapter
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.part_memory import sampling_memory
from sdlora.training.step_shape import StepShape
from tests.real_size import write_hollow_checkpoint

RANK = 16
STEPS = (
    ("SD 1.5, 512 x 512", "sd1", 512, "none", False, 4.0),
    ("SDXL, 1024 x 1024, gradient checkpointing", "sdxl", 1024, "none", True, 10.0),
    ("SDXL, 1024 x 1024, gradient checkpointing, base in 8 bits", "sdxl", 1024, "int8", True, 8.0),
    ("SDXL, 1024 x 1024, gradient checkpointing, base in 4 bits", "sdxl", 1024, "nf4", True, 7.0),
)
"""Name, family, side in pixels, quantization, checkpointing, and the gigabytes that it must stay below."""
SAMPLING = "SDXL, 1024 x 1024, sampling with merged LoRAs, where memory is short"
BOUNDS = {name: bound for name, *_, bound in STEPS} | {SAMPLING: 8.0}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table. A gigabyte is 10^9 bytes."""

    name: str
    gigabytes: float
    parts: dict[str, float]
    """What they consist of."""
    measured: float | None
    """The most that torch allocated on CUDA; None without it."""


def rows(folder: Path) -> list[Row]:
    """The table: batch 1, rank 16, attention, frozen text encoders, bfloat16; files without content go to ``folder``."""
    settings = ["data.images=x", "data.trigger=zorb", "output.path=x.safetensors", f"lora.rank={RANK}"]
    config = load_config(None, [*settings, "optimizer.text_encoder_learning_rate=0"])
    bases = {
        family: find_base(str(write_hollow_checkpoint(folder / f"{family}.safetensors", family)))
        for family in ("sd1", "sdxl")
    }
    table = []
    for name, family, side, quantization, checkpointing, _ in STEPS:
        checkpoint = replace(bases[family], quantization=quantization)
        shape = StepShape(micro_batch=1, checkpointing=checkpointing)
        memory = step_memory(checkpoint, config, width=side, height=side, shape=shape, dtype=torch.bfloat16)
        parts = {part: _gb(size) for part, size in vars(memory).items()}
        cuda = torch.cuda.is_available()
        measured = _gb(measured_step(checkpoint, config, side=side, shape=shape)) if cuda else None
        table.append(Row(name=name, gigabytes=_gb(memory.total), parts=parts, measured=measured))
    base = load_base(bases["sdxl"], device=META, dtype=torch.float16)
    sampling = sampling_memory(base, width=1024, height=1024, device_type="cuda")
    parts = {part: _gb(size) for part, size in vars(sampling).items()}
    return [*table, Row(name=SAMPLING, gigabytes=_gb(sampling.least), parts=parts, measured=None)]


def measured_step(checkpoint: BaseCheckpoint, config: Config, *, side: int, shape: StepShape) -> int:
    """The most bytes that torch allocated on CUDA in a step of one image, bfloat16, with the base and the optimizer."""
    cuda = torch.device("cuda")
    base = load_base(checkpoint, device=cuda, dtype=torch.bfloat16, home=torch.device("cpu"))
    move_to(cuda, base.unet)
    torch.cuda.reset_peak_memory_stats(cuda)
    adapter = new_adapter(base, config)
    rates = [group.rate for group in adapter.groups]
    optimizer = GuardedAdamW(adapter.parameters, rates, config.optimizer, steps=2)
    adapter.attach(base.modules())
    if shape.checkpointing:
        base.unet.enable_gradient_checkpointing()
    for step in range(2):
        adapter.begin_step()
        stand_in_loss(base, config, 1, width=side, height=side, chunks=1).backward()
        adapter.end_backward()
        optimizer.step(step)
    return torch.cuda.max_memory_allocated(cuda)


def _gb(size: float) -> float:
    return round(size / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = rows(Path(folder))
    if arguments.json:
        print(json.dumps([asdict(row) | {"below": BOUNDS[row.name]} for row in table]))
        return
    print("| | GB | measured | below | of which |\n|---|---|---|---|---|")
    for row in table:
        parts = ", ".join(f"{part} {size:.2f}" for part, size in row.parts.items())
        measured = "" if row.measured is None else f"{row.measured:.2f}"
        print(f"| {row.name} | {row.gigabytes:.2f} | {measured} | {BOUNDS[row.name]:g} | {parts} |")


if __name__ == "__main__":
    main()
