"""A stopped, killed or restarted run ends with the file of an uninterrupted one; a changed run is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sdlora as package
from sdlora.base.checkpoint import find_base
from sdlora.errors import ResumeError
from sdlora.formats.safetensors_file import read_header
from sdlora.training.checkpoint import RunIdentity
from sdlora.training.session import TrainingSession
from tests.conftest import write_images
from tests.training_runs import STEPS, config_for, everything, overrides, same_but_for_times, toml


def test_a_finished_run_does_nothing_and_a_changed_one_is_refused(finished: tuple[Path, Path], tiny_base: Path) -> None:
    images, output = finished
    before = output.stat().st_mtime_ns
    assert package.train(config_for(tiny_base, images, output)).result.loss is None
    with pytest.raises(ResumeError, match=r"train\.seed was 0, is now 5"):
        package.train(config_for(tiny_base, images, output, "train.seed=5"))
    assert output.stat().st_mtime_ns == before


def test_the_same_run_again_gives_the_same_tensors(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    package.train(config_for(tiny_base, finished[0], tmp_path / "x.safetensors"))
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
    report = json.loads(result.stdout)
    assert 4 <= report["resumed_from"] < STEPS
    assert report["validation_loss"] is None
    assert [file.name for file in checkpoint.parent.iterdir()] == ["last.safetensors"]
    same_but_for_times(finished[1], output)


def test_ctrl_c_saves_and_says_so(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    more = ("train.steps=100000", "train.save_every=100000")
    command = [sys.executable, "-m", "sdlora.cli", "train", *overrides(tiny_base, finished[0], output, *more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    # Off a terminal, a line is written where a phase starts, however long a busy machine takes until then.
    assert any("Training" in line for line in process.stderr)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "run the same command to resume" in errors
    assert list((tmp_path / "x.resume").glob("step-*.safetensors"))
    assert not output.exists()


def test_damaged_checkpoints_are_skipped(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    folder = tmp_path / "x.resume"
    folder.mkdir()
    (folder / "step-00000008.safetensors").write_bytes(b"torn")
    assert package.train(config_for(tiny_base, finished[0], output)).result.resumed_from == 0
    same_but_for_times(finished[1], output)


class Stopped(Exception):
    pass


def test_stopped_at_any_step_and_resumed_with_everything_on(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*everything(tmp_path), "train.save_every=1"]
    whole, parts = (tmp_path / name / "x.safetensors" for name in ("whole", "parts"))
    first = package.train(config_for(tiny_base, None, whole, *more)).result
    take_step = TrainingSession.step
    for stop in (1, 4, 9):

        def step(self: TrainingSession, number: int, stop: int = stop) -> torch.Tensor:
            if number == stop:
                raise Stopped
            return take_step(self, number)

        monkeypatch.setattr(TrainingSession, "step", step)
        with pytest.raises(Stopped):
            package.train(config_for(tiny_base, None, parts, *more))
    monkeypatch.setattr(TrainingSession, "step", take_step)
    last = package.train(config_for(tiny_base, None, parts, *more)).result
    assert last.resumed_from == 9
    same_but_for_times(whole, parts)
    assert first.validation_loss == last.validation_loss
    assert first.validation_loss
    metadata = read_header(parts, ResumeError).metadata
    assert float(metadata["sdlora_validation_loss"]) == first.validation_loss
    assert str(tmp_path) not in json.dumps(dict(metadata))


def test_where_encodings_are_kept_is_no_part_of_a_run(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    images, output = finished
    for more in (["cache.disk=false"], ["cache.max_gigabytes=1", f"cache.folder={json.dumps(str(tmp_path))}"]):
        assert package.train(config_for(tiny_base, images, output, *more)).result.loss is None
    sets = [{"images": str(images)}]
    again = config_for(tiny_base, None, output, f"data.sets={toml(sets)}")
    assert package.train(again).result.loss is None
    for more in ("data.flip=true", "data.crop=random", "data.keep_tokens=2", "data.bucket_rule=kohya"):
        with pytest.raises(ResumeError, match=more.partition("=")[0]):
            package.train(config_for(tiny_base, images, output, more))
    with pytest.raises(ResumeError, match=r"data\.sets"):
        package.train(config_for(tiny_base, None, output, f"data.sets={toml([{**sets[0], 'repeats': 2}])}"))


def test_a_half_done_run_resumes_with_other_sample_prompts(tiny_base: Path, tmp_path: Path) -> None:
    output, images = tmp_path / "x.safetensors", write_images(tmp_path / "images")
    config = config_for(tiny_base, images, output)
    earlier = RunIdentity.of(config, dataset="d", base=find_base(config.base))
    other = config_for(tiny_base, images, output, 'samples.prompts=["a fox"]')
    assert RunIdentity.of(other, dataset="d", base=find_base(other.base)).differences(earlier) == []
