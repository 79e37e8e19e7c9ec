"""Training on a tiny base: exact resumption, interrupts, several processes, and what the file says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sdlora as package
from sdlora.config import Config, load_config
from sdlora.errors import BaseModelError, ConfigError, DataError, ResumeError, TrainingError
from sdlora.formats.safetensors_file import read_header
from sdlora.training.plan import plan_run
from tests.conftest import write_pictures

STEPS = 12
TIMES = {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}
Run = Callable[..., subprocess.CompletedProcess[str]]


def config_for(base: Path, pictures: Path, out: Path, *more: str) -> Config:
    return load_config(None, overrides(base, pictures, out, *more))


def overrides(base: Path, pictures: Path, out: Path, *more: str) -> list[str]:
    return [
        f"base.path={base}", f"data.images={pictures}", "data.trigger=zorb", f"output.path={out}", f"train.steps={STEPS}",
        "train.batch_size=2", "train.save_every=2", "lora.rank=4", "train.learning_rate=1e-2", "output.samples=[]",
        "train.text_encoder_learning_rate=1e-3", *more,
    ]  # fmt: skip


def same_but_for_times(one: Path, other: Path) -> None:
    data = [file.read_bytes()[read_header(file, ResumeError).payload_start :] for file in (one, other)]
    assert data[0] == data[1]
    tables = [dict(read_header(file, ResumeError).metadata) for file in (one, other)]
    differing = {key for key in tables[0].keys() | tables[1].keys() if tables[0].get(key) != tables[1].get(key)}
    assert differing <= TIMES | {"sshs_legacy_hash"}


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(pictures, output) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    pictures = write_pictures(folder / "pictures", 5, sizes=((64, 64), (80, 48)))
    package.train(config_for(tiny_base, pictures, folder / "x.safetensors"), show_progress=False)
    return pictures, folder / "x.safetensors"


def test_file_holds_every_module_and_the_change_is_not_zero(finished: tuple[Path, Path], tiny_base: Path) -> None:
    report = package.inspect(finished[1])
    assert report.modules == {"unet": 32, "text_encoder": 8, "text_encoder_2": 0}
    assert (report.family, report.dialect, report.trigger, report.problems) == ("sd1", "kohya", ("zorb",), ())
    assert report.rank
    assert report.rank.min == report.rank.max == 4
    assert report.norm
    assert min(report.norm.values()) > 0.01
    metadata = report.metadata
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"]
    assert [buckets[i] for i in "01"] == [{"resolution": [64, 64], "count": 3}, {"resolution": [80, 48], "count": 2}]
    assert metadata["ss_steps"] == str(STEPS)
    assert str(tiny_base.parent) not in json.dumps(metadata)


def test_a_finished_run_does_nothing_and_a_changed_one_is_refused(finished: tuple[Path, Path], tiny_base: Path) -> None:
    pictures, output = finished
    before = output.stat().st_mtime_ns
    assert package.train(config_for(tiny_base, pictures, output), show_progress=False).result.loss is None
    with pytest.raises(ResumeError, match=r"train\.seed was 0, is now 5"):
        package.train(config_for(tiny_base, pictures, output, "train.seed=5"), show_progress=False)
    assert output.stat().st_mtime_ns == before


def test_the_same_run_again_gives_the_same_tensors(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    package.train(config_for(tiny_base, finished[0], tmp_path / "x.safetensors"), show_progress=False)
    same_but_for_times(finished[1], tmp_path / "x.safetensors")


def test_killed_and_resumed_equals_uninterrupted(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    command = [sys.executable, "-m", "sdlora.cli", "train", *overrides(tiny_base, finished[0], output), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "x.resume" / "step-00000004.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not output.exists()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 4 <= json.loads(result.stdout)["resumed_from"] < STEPS
    assert not checkpoint.parent.exists()
    same_but_for_times(finished[1], output)


def test_ctrl_c_saves_and_says_so(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    more = ("train.steps=100000", "train.save_every=100000")
    command = [sys.executable, "-m", "sdlora.cli", "train", *overrides(tiny_base, finished[0], output, *more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Training has begun when the process has used its processors for a while after the imports.
    time.sleep(15)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in errors
    assert list((tmp_path / "x.resume").glob("step-*.safetensors"))
    assert not output.exists()


def test_damaged_checkpoints_are_passed_over(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    folder = tmp_path / "x.resume"
    folder.mkdir()
    (folder / "step-00000008.safetensors").write_bytes(b"torn")
    assert package.train(config_for(tiny_base, finished[0], output), show_progress=False).result.resumed_from == 0
    same_but_for_times(finished[1], output)


def test_two_processes_train_what_one_trains(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sdlora.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [sys.executable, *launch, "train", *overrides(tiny_base, finished[0], output, "train.precision=float32")],
        check=True, capture_output=True, env=environment, timeout=300,
    )  # fmt: skip
    alone = tmp_path / "alone.safetensors"
    package.train(config_for(tiny_base, finished[0], alone, "train.precision=float32"), show_progress=False)
    one, two = load_file(alone), load_file(output)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key].float(), two[key].float(), rtol=2e-2, atol=2e-3)


def test_frozen_text_encoder_is_left_out(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    more = ("train.text_encoder_learning_rate=0", "train.caption_dropout=0.5")
    package.train(config_for(tiny_base, finished[0], output, *more), show_progress=False)
    report = package.inspect(output)
    assert report.modules == {"unet": 32, "text_encoder": 0, "text_encoder_2": 0}
    assert report.metadata["ss_text_encoder_lr"] == "None"


def test_a_run_that_diverges_stops_and_writes_nothing(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    more = ("train.learning_rate=0.99", "train.max_grad_norm=1e30", "lora.alpha=1e30", "train.warmup_steps=0")
    with pytest.raises(TrainingError, match=r"lower train\.learning_rate"):
        package.train(config_for(tiny_base, finished[0], output, *more), show_progress=False)
    assert not output.exists()


def test_faults_are_found_before_a_model_is_loaded(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sdlora.training.loop.load_base", refuse)
    output = tmp_path / "x.safetensors"
    with pytest.raises(DataError):
        package.train(config_for(tiny_base, tmp_path / "none", output), show_progress=False)
    with pytest.raises(BaseModelError, match="no such base"):
        package.train(config_for(tmp_path / "none", finished[0], output), show_progress=False)
    rates = ("train.learning_rate=0", "train.text_encoder_learning_rate=0")
    with pytest.raises(ConfigError, match="nothing would be trained"):
        package.train(config_for(tiny_base, finished[0], output, *rates), show_progress=False)


def test_pictures_of_other_shapes_get_buckets_of_their_own(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "set", 6, sizes=((300, 300), (400, 250), (100, 190)))
    config = load_config(None, [f"data.images={pictures}", "data.trigger=zorb", "output.path=x.safetensors"])
    plan = plan_run(config)
    assert {(p.width, p.height) for p in plan.placements} == {(128, 128), (160, 96), (96, 160)}
    assert len(plan.batches.buckets) == 3
