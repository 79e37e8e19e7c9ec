"""A run that did not learn says so; one that did, or that is too short to tell, does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import sdlora
from sdlora.cli import app
from sdlora.training.course import loss_warning
from tests.training_runs import config_for, overrides

NOISE = np.random.default_rng(0).gamma(4.0, 0.0075, 300)
"""Losses of a run in which nothing changes: their spread is half of their mean."""


@pytest.mark.parametrize(
    ("losses", "first", "said"),
    [
        (NOISE, 0, None),
        (NOISE * np.linspace(2, 1, 300), 0, None),
        (NOISE * np.linspace(1, 6, 300), 0, "rose from"),
        (NOISE * np.linspace(1, 6, 300), 1, None),
        (NOISE[200:], 200, None),
        (NOISE[280:] + 2, 280, None),
        (NOISE + 2, 0, "worse than predicting nothing"),
        (NOISE[200:] + 2, 200, "worse than predicting nothing"),
        (np.where(np.arange(300) == 290, np.nan, NOISE), 0, "NaN or Inf"),
        (np.zeros(0), 300, None),
    ],
)
def test_the_losses_tell(losses: np.ndarray, first: int, said: str | None) -> None:
    warning = loss_warning(losses.tolist(), first=first, steps=300, unlearned=0.8)
    assert (said in warning and "optimizer.learning_rate" in warning) if said and warning else warning is said


def test_noise_alone_and_short_runs_say_nothing() -> None:
    rng = np.random.default_rng(1)
    runs = [rng.gamma(1.0, 0.03, 100).tolist() for _ in range(1000)]
    assert sum(loss_warning(run, first=0, steps=100, unlearned=0.8) is not None for run in runs) <= 5
    assert loss_warning([5.0] * 99, first=0, steps=99, unlearned=0.8) is None


def test_a_learning_rate_that_is_too_high_is_named(images: Path, tmp_path: Path) -> None:
    more = ("train.steps=100", "optimizer.learning_rate=0.1", "optimizer.warmup_steps=100", "train.save_every=100")
    given = overrides(Path("mini"), images, tmp_path / "x.safetensors", *more, "data.resolution=64")
    result = CliRunner().invoke(app, ["train", *given, "--json"])
    assert result.exit_code == 0, result.output
    assert "optimizer.learning_rate is probably too high" in json.loads(result.stdout)["warning"]
    assert "optimizer.learning_rate is probably too high" in result.stderr.replace("\n", " ")


def test_a_usual_learning_rate_says_nothing(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    more = ("train.steps=100", "train.save_every=100", "optimizer.learning_rate=1e-3")
    config = config_for(tiny_base, finished[0], tmp_path / "x.safetensors", *more)
    result = sdlora.train(config, say=said.append).result
    assert result.warning is None, result
    assert not any("learning_rate" in line for line in said)
