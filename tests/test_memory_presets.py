"""The presets for GPUs of each size, and the figures that the documentation states, from models without memory."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.memory import BOUNDS, Row, rows
from sdlora.base.checkpoint import BaseCheckpoint, find_base
from sdlora.base.load import load_base
from sdlora.config.loading import load_config
from sdlora.config.resolve import resolve_config
from sdlora.training.forecast import taken
from sdlora.training.memory import META, step_memory
from sdlora.training.part_memory import encoding_memory
from sdlora.training.step_shape import StepShape
from tests.conftest import ROOT
from tests.real_size import write_hollow_checkpoint

PRESETS = sorted((ROOT / "configs").glob("*-*gb.toml"))
FAMILIES = {"sd15": "sd1", "sdxl": "sdxl"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseCheckpoint]:
    folder = tmp_path_factory.mktemp("hollow")
    return {
        name: find_base(str(write_hollow_checkpoint(folder / f"{family}.safetensors", family)))
        for name, family in FAMILIES.items()
    }


def test_there_is_a_preset_for_each_size() -> None:
    assert {file.stem for file in PRESETS} == {f"{name}-{size}gb" for name in FAMILIES for size in (6, 8, 12, 16, 24)}


@cache
def most_for_encoding(checkpoint: BaseCheckpoint, side: int) -> int:
    base = load_base(checkpoint, device=META, dtype=torch.bfloat16)
    return max(encoding_memory(base, width=side, height=side, chunks=3, device_type="cuda").values())


@pytest.mark.parametrize("preset", PRESETS, ids=lambda file: file.stem)
def test_a_preset_fits_its_gpu_with_a_gigabyte_to_spare(preset: Path, checkpoints: dict[str, BaseCheckpoint]) -> None:
    """With captions of three chunks, and a gigabyte (or more: ``taken``) for the context and what cannot be reused."""
    name, size = re.fullmatch(r"(\w+)-(\d+)gb", preset.stem).groups()  # ty: ignore
    checkpoint = checkpoints[name]
    config = resolve_config(load_config(preset, ["data.images=x", "output.path=x.safetensors"]), checkpoint.family)
    side = config.data.resolution
    assert isinstance(side, int)
    assert isinstance(config.train.micro_batch, int)
    assert isinstance(config.train.gradient_checkpointing, bool)
    memory = step_memory(
        replaced(checkpoint, config.base.quantization),
        config,
        width=side,
        height=side,
        shape=StepShape(micro_batch=config.train.micro_batch, checkpointing=config.train.gradient_checkpointing),
        dtype=torch.bfloat16,
        chunks=3,
    )
    needed = max(memory.total, most_for_encoding(checkpoint, side))
    assert max(taken(needed), needed + 1e9) <= int(size) * 1e9


@cache
def replaced(checkpoint: BaseCheckpoint, quantization: str) -> BaseCheckpoint:
    return replace(checkpoint, quantization=quantization)


def test_the_table_stays_within_the_stated_bounds(tmp_path: Path) -> None:
    table: dict[str, Row] = {row.name: row for row in rows(tmp_path)}
    assert set(BOUNDS) == set(table)
    assert {name: row.gigabytes for name, row in table.items() if row.gigabytes >= BOUNDS[name]} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_table_is_what_cuda_takes(tmp_path: Path) -> None:
    """Up to kernels' workspace, which torch allocates too."""
    for row in rows(tmp_path):
        if row.measured is not None:
            assert row.measured == pytest.approx(row.gigabytes, rel=0.15), row.name
