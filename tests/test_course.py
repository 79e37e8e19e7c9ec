"""A run that learned nothing or diverged says so; one that learned, or that is too short to judge, does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import sdlora
from sdlora.cli import app
from sdlora.config.loading import load_config
from sdlora.progress import Silence
from sdlora.training.course import OwnLosses, own_losses, run_warning
from tests.conftest import ROOT
from tests.training_runs import config_for, overrides, session_for

ALONE = np.array([0.6, 0.3, 0.2, 0.1, 0.06, 0.04, 0.02, 0.01])
ONE = np.ones(8)
TOO_HIGH = "optimizer.learning_rate is probably too high"


@pytest.mark.parametrize(
    ("trained", "alone", "said"),
    [
        (0.97 * ALONE, ALONE, None),
        (0.99 * ALONE, 0.95 * ONE, None),
        (1.2 * ALONE, ALONE, f"worse (the loss on its training images is 0.1995 with it, 0.1663.*{TOO_HIGH}"),
        (np.where(np.arange(8) == 5, np.nan, ALONE), ALONE, f"NaN or Inf.*{TOO_HIGH}"),
        (np.where(np.arange(8) == 5, np.inf, ALONE), ALONE, f"NaN or Inf.*{TOO_HIGH}"),
        (ALONE, ALONE, "learned almost nothing.*optimizer.learning_rate is probably too low"),
        (0.9995 * ALONE, ALONE, "learned almost nothing.*optimizer.learning_rate is probably too low"),
    ],
)  # fmt: skip
def test_losses_with_and_without_the_lora_say_what_happened(
    trained: np.ndarray, alone: np.ndarray, said: str | None
) -> None:
    unexplained = np.tile([0.5, 0.9], (8, 1))
    warning = run_warning(
        trained=OwnLosses(losses=trained, unexplained=unexplained),
        alone=OwnLosses(losses=alone, unexplained=unexplained),
    )
    if said is None:
        assert warning is None
    else:
        assert warning is not None
        start, _, end = said.partition(".*")
        assert start in warning
        assert end in warning
        assert warning.endswith("with --restart")


def trained(base: Path, images: Path, out: Path, *more: str) -> str | None:
    given = (
        "train.steps=50",
        "train.save_every=50",
        "train.batch_size=1",
        "optimizer.text_encoder_learning_rate=0",
        *more,
    )
    return sdlora.train(config_for(base, images, out, *given)).result.warning


@pytest.mark.parametrize(
    ("rate", "said"),
    [("0.9", TOO_HIGH), ("1e-9", "learned almost nothing"), ("1e-7", "learned almost nothing"), ("1e-3", None)],
)
def test_learning_rates_on_a_random_base(
    rate: str, said: str | None, finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    warning = trained(tiny_base, finished[0], tmp_path / "x.safetensors", f"optimizer.learning_rate={rate}")
    assert (said in warning) if said and warning else warning is said


def test_a_resumed_run_is_judged_by_the_same_comparison(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlora.training import loop

    more, judged = ("optimizer.learning_rate=0.9", "train.save_every=45"), []
    monkeypatch.setattr(loop, "run_warning", lambda **given: judged.append(given) or run_warning(**given))
    whole = trained(tiny_base, finished[0], tmp_path / "whole.safetensors", *more)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "own_losses", lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            trained(tiny_base, finished[0], tmp_path / "x.safetensors", *more)
    (tmp_path / "x.resume" / "step-00000050.safetensors").unlink(missing_ok=True)
    assert trained(tiny_base, finished[0], tmp_path / "x.safetensors", *more) == whole
    assert all(np.array_equal(judged[0][key].losses, judged[1][key].losses) for key in ("trained", "alone"))


def test_a_short_run_is_not_judged(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    session = session_for(tiny_base, finished[0], tmp_path / "x.safetensors", "train.steps=49")
    assert own_losses(session, Silence()) is None


def test_a_wrong_kind_of_prediction_is_detected_by_the_base_alone(images: Path, tmp_path: Path) -> None:
    for prediction, said in (("v_prediction", "learned almost nothing"), ("epsilon", "base.prediction is probably")):
        more = ("train.steps=50", f"base.prediction={prediction}", "data.resolution=64")
        session = session_for(Path("mini"), images, tmp_path / "x.safetensors", *more)
        alone = own_losses(session, Silence())
        assert alone is not None
        warning = run_warning(trained=alone, alone=alone)
        assert warning is not None
        assert said in warning


def test_a_learning_rate_that_is_too_high_is_named(images: Path, tmp_path: Path) -> None:
    more = ("train.steps=50", "optimizer.learning_rate=0.1", "optimizer.warmup_steps=25", "train.batch_size=1")
    given = overrides(Path("mini"), images, tmp_path / "x.safetensors", *more, "data.resolution=64")
    result = CliRunner().invoke(app, ["train", *given, "--json"])
    assert result.exit_code == 0, result.output
    assert TOO_HIGH in json.loads(result.stdout)["warning"]
    assert TOO_HIGH in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_settings_of_the_quickstart_say_nothing(seed: int, tmp_path: Path) -> None:
    said: list[str] = []
    given = (f"train.seed={seed}", "train.steps=50", "train.batch_size=1", "data.resolution=64")
    more = [*given, f"output.path={tmp_path / 'x.safetensors'}"]
    config = load_config(ROOT / "configs" / "quickstart-blueprint.toml", more)
    assert sdlora.train(config, say=said.append).result.warning is None
    assert not any("learning_rate" in line for line in said)
