"""sdlora plan: what a run will take, compared with runs and files that are really made."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sdlora
from sdlora.cli import app
from sdlora.config.sections import Config
from sdlora.errors import ConfigError, DataError
from sdlora.training.forecast import Forecast, taken, with_settings
from tests.training_runs import config_for, overrides


def forecast(config: Config, **more: object) -> Forecast:
    return sdlora.plan(config, **{"probe": False, "progress": sdlora.Silence(), **more})  # ty: ignore


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_the_file_has_the_size_that_was_said(
    tiny_files: dict[str, Path], tmp_path: Path, images: Path, family: str, rate: float
) -> None:
    more = (
        "train.steps=1",
        "output.metadata=none",
        f"optimizer.text_encoder_learning_rate={rate}",
        "data.resolution=64",
    )
    config = config_for(tiny_files[family], images, tmp_path / "x.safetensors", *more)
    said = forecast(config)
    sdlora.train(config, progress=sdlora.Silence())
    assert (tmp_path / "x.safetensors").stat().st_size == said.file_bytes


def test_steps_epochs_and_what_is_written_to_the_disk(tiny_base: Path, tmp_path: Path, images: Path) -> None:
    """5 images in batches of 2 are 3 steps an epoch; 64 x 64 pixels are 8 x 8 cells of 4 channels, mean and deviation."""
    config = config_for(tiny_base, images, tmp_path / "out" / "x.safetensors", "data.resolution=64")
    said = forecast(config)
    assert (said.images, said.steps, said.epochs) == (5, 12, 4)
    assert said.cache_bytes == 5 * 2 * 4 * 8 * 8 * 4
    assert not (tmp_path / "out").exists()


def test_the_json_has_the_documented_names(tiny_base: Path, tmp_path: Path, images: Path) -> None:
    arguments = [
        "plan",
        *overrides(tiny_base, images, tmp_path / "x.safetensors"),
        "--no-probe",
        "--json",
        "--gpu",
        "8",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert set(answer) >= {"steps", "epochs", "seconds", "peak_gb", "disk_gb", "file_mb", "fits"}
    assert (answer["seconds"], answer["fits"], answer["set"]) == (None, True, {})
    text = CliRunner().invoke(app, [*arguments[:-3], "--gpu", "8"])
    assert text.stdout.splitlines()[0] == "5 images, 12 steps, 4.0 epochs"
    assert text.stdout.endswith("fits into 8 GB\n")


def test_options_are_those_of_train(tiny_base: Path, images: Path) -> None:
    options = ("--images", str(images), "--trigger", "zorb", "--base", str(tiny_base), "--resolution", "64")
    result = CliRunner().invoke(app, ["plan", *options, "--no-probe", "train.steps=30", "--json"])
    assert json.loads(result.stdout)["steps"] == 30
    assert CliRunner().invoke(app, ["plan"]).exit_code == 2


def test_faults_of_the_data_are_reported_as_train_does(tiny_base: Path, tmp_path: Path, images: Path) -> None:
    (images / "1.png").write_bytes(b"")
    config = config_for(tiny_base, images, tmp_path / "x.safetensors")
    problems = []
    for verb in (forecast, lambda config: sdlora.train(config, progress=sdlora.Silence())):
        with pytest.raises(DataError) as caught:
            verb(config)
        problems.append(caught.value.problems)
    assert problems[0] == problems[1]
    result = CliRunner().invoke(app, ["plan", *overrides(tiny_base, images, tmp_path / "x.safetensors")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("gpu", [0, -8, float("nan"), float("inf"), "8"])
def test_a_size_of_a_gpu_that_is_none_is_refused(tiny_base: Path, tmp_path: Path, images: Path, gpu: object) -> None:
    with pytest.raises(ConfigError, match="expected the memory of a GPU in gigabytes"):
        forecast(config_for(tiny_base, images, tmp_path / "x.safetensors"), gpu=gpu)


def test_the_time_is_measured_on_two_steps(tiny_base: Path, tmp_path: Path, images: Path) -> None:
    config, said = config_for(tiny_base, images, tmp_path / "x.safetensors", "data.resolution=64"), []
    measured = forecast(config, probe=True, say=said.append)
    assert measured.seconds is not None
    assert 0 < measured.seconds < 60
    assert said[0].startswith("5 images: ")
    assert any("--no-probe" in line for line in said)
    stop = threading.Event()
    stop.set()
    with pytest.raises(sdlora.Interrupted, match="measuring"):
        forecast(config, probe=True, stop=stop)
    assert forecast(config, probe=True, gpu=8).seconds is None


def test_what_is_said_to_fit_fits(tmp_path: Path, images: Path) -> None:
    """On ``mini``, what torch takes for itself leaves room for a step as it is, only with other settings, or for none."""
    config = config_for(Path("mini"), images, tmp_path / "x.safetensors", "data.resolution=128", "train.batch_size=4")
    large = forecast(config, gpu=8)
    assert (large.fits, large.settings, large.shape.micro_batch) == (True, {}, 4)
    least = with_settings(
        config,
        {"train.micro_batch": 1, "train.gradient_checkpointing": True, "optimizer.text_encoder_learning_rate": 0.0},
    )
    gpu = taken(forecast(least, gpu=8).step.total) / 1e9
    small = forecast(config, gpu=gpu)
    assert not small.fits
    assert small.settings["optimizer.text_encoder_learning_rate"] == 0
    again = forecast(with_settings(config, small.settings), gpu=gpu)
    assert (again.fits, again.settings) == (True, {})
    hopeless = forecast(config, gpu=gpu / 2)
    assert (hopeless.fits, hopeless.settings) == (False, {})
