"""Runs that are killed at any moment, as often as it happens, end with the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlora.config.optimizer_rules import OWN_NAMES
from sdlora.errors import ResumeError
from sdlora.formats.safetensors_file import read_header
from tests.killed_processes import run
from tests.training_runs import everything, overrides, same_but_for_times

RULES = (
    '[{pattern = "*attn2*", rank = 2, learning_rate = 5e-3}, {pattern = "*text_encoder*", rank = 3},'
    ' {pattern = "*mid_block*", train = false}]'
)
ALL_ON = [
    *("lora.kind=dora", 'lora.targets="attention-mlp"', f"lora.rules={RULES}"),
    *("lora.dropout=0.1", "lora.rank_dropout=0.1", "lora.module_dropout=0.1", "lora.max_norm=0.5", "lora.rslora=true"),
    *("optimizer.ema=0.8", "optimizer.lora_plus_ratio=4", "optimizer.text_encoder_stop=7", "optimizer.warmup_steps=3"),
    *("optimizer.schedule=cosine_with_restarts", "optimizer.schedule_cycles=2", "optimizer.weight_decay=0.05"),
    *("objective.loss=huber", "objective.weighting=soft_min_snr", "objective.max_timestep=950"),
    *("train.micro_batch=1", "train.gradient_checkpointing=true", "train.save_every=2"),
    *(
        "validation.every=4",
        "validation.stop=9",
        'samples.prompts=["a fox"]',
        "samples.every=4",
        "samples.at_first=true",
    ),
    *("samples.steps=1", "output.save_every=3", "output.keep=2", "output.log=true"),
]
"""What ``everything`` of the images leaves out."""
BESIDE = ("-000006.safetensors", "-000009.safetensors", ".log.csv", ".validation.csv", ".log.svg", ".samples.png")


def killed_and_resumed(settings: list[str], moments: Path, kills: list[float]) -> int:
    """Run to the end, killed at each of ``kills``, shares of the moments of a whole run; returns how often it was killed."""
    total, killed = int(moments.read_text()), 0
    own = moments.with_name("moments of the rest")
    for share in kills:
        code = run(settings, kill_at=round(share * total), moments=own)
        assert code in (0, -9)
        killed += code == -9
        if code == 0:
            break
    assert run(settings, kill_at=None, moments=own) == 0
    return killed


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_anywhere_with_everything_on(kills: int, tiny_base: Path, tmp_path: Path) -> None:
    """As many runs as it takes: each call of a run is killed within a third of the moments of a whole one."""
    more, moments = [*everything(tmp_path), *ALL_ON], tmp_path / "moments"
    whole = tmp_path / "whole" / "x.safetensors"
    assert run(overrides(tiny_base, None, whole, *more), kill_at=None, moments=moments) == 0
    assert float(read_header(whole, ResumeError).metadata["sdlora_validation_loss"]) > 0
    drawn, done = random.Random(kills), 0
    while done < kills:
        parts = tmp_path / f"after {done}" / "x.safetensors"
        shares = [drawn.uniform(0, 1 / 3) for _ in range(kills - done)]
        killed = killed_and_resumed(overrides(tiny_base, None, parts, *more), moments, shares)
        assert killed
        done += killed
        same_files(whole, parts)


def same_files(whole: Path, parts: Path) -> None:
    """All that two runs wrote is the same, except for times."""
    same_but_for_times(whole, parts, ignoring={"modelspec.thumbnail"})
    for end in BESIDE:
        one, other = (file.with_name(f"x{end}") for file in (whole, parts))
        if end.endswith(".safetensors"):
            same_but_for_times(one, other)
        elif end.endswith(".png"):
            assert np.array_equal(*(np.asarray(Image.open(file)) for file in (one, other)))
        else:
            assert one.read_bytes() == other.read_bytes(), end
    # A kill within a writing leaves what was written of it so far, under a hidden name.
    names = [
        {file.name for file in place.iterdir() if file.suffix != ".partial"} for place in (whole.parent, parts.parent)
    ]
    assert names[0] == names[1]


QUICK = ("came", "prodigy", "schedule-free")
"""Optimizers whose states are least like AdamW's; ``test_optimizers`` has the states of all of them."""


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in sorted({*OWN_NAMES, "muon"} - {*QUICK}))],
)
def test_a_run_with_any_optimizer_is_killed_and_resumed(
    name: str, images: Path, tiny_base: Path, tmp_path: Path
) -> None:
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        pytest.skip("needs the extra quant")
    more = [f"optimizer.name={name}", "train.steps=6", "optimizer.warmup_steps=2", "optimizer.learning_rate=1e-3"]
    more += ["optimizer.learning_rate=1", "optimizer.text_encoder_learning_rate=1"] if name == "prodigy" else []
    files = {each: tmp_path / each / "x.safetensors" for each in ("whole", "parts")}
    settings = {each: overrides(tiny_base, images, file, *more) for each, file in files.items()}
    moments = tmp_path / "moments"
    assert run(settings["whole"], kill_at=None, moments=moments) == 0
    assert killed_and_resumed(settings["parts"], moments, [0.6]) == 1
    same_but_for_times(files["whole"], files["parts"])
    assert (
        json.loads(read_header(files["whole"], ResumeError).metadata["sdlora_run"])["config"]["optimizer.name"]
        == f'"{name}"'
    )
