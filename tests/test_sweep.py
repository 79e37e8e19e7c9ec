"""``sdlora sweep`` with real trainings on the tiny base: done, skipped, failed, stopped and resumed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import sdlora as package
from sdlora.cli import app
from sdlora.errors import ConfigError, ResumeError
from sdlora.progress import Silence
from sdlora.sweeps.results import RunResult, read_results
from tests.conftest import ROOT, write_images
from tests.training_runs import same_but_for_times

NAMES = {"ss_output_name", "modelspec.title"}
"""What a file says of its own name."""
SWEEP = """
[base]
path = {base}
[data]
trigger = "zorb"
[lora]
rank = 4
[optimizer]
learning_rate = 1e-2
[train]
steps = {steps}
batch_size = 2
save_every = 2
[samples]
prompts = []
[cache]
disk = false
[grid]
"data.images" = {images}
"""


def write_sweep(folder: Path, base: Path, *names: str, steps: int = 12) -> Path:
    write_images(folder / "good", 5, sizes=((64, 64), (80, 48)))
    write_images(folder / "other", 4)
    (folder / "s.toml").write_text(SWEEP.format(base=json.dumps(str(base)), steps=steps, images=json.dumps(names)))
    return folder / "s.toml"


def sweep(file: Path, *overrides: str, **options) -> dict[str, RunResult]:
    report = package.sweep(file, overrides, out=file.parent / "out", progress=Silence(), **options)
    return {run.run: run for run in report.runs}


def test_two_runs_are_those_that_train_makes_and_a_second_call_does_nothing(tiny_base: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, tiny_base, "good", "other")
    runs = sweep(file, jobs=2)
    assert {name: (run.state, run.steps, run.file) for name, run in runs.items()} == {
        "images=good": ("done", 12, "images=good/images=good.safetensors"),
        "images=other": ("done", 12, "images=other/images=other.safetensors"),
    }
    folder = tmp_path / "out" / "images=good"
    answer = json.loads((folder / "answer.json").read_text())
    assert runs["images=good"].loss == pytest.approx(answer["loss"], rel=1e-5)
    assert runs["images=good"].seconds > answer["seconds"] > 0
    # The same run, alone.
    alone = tmp_path / "alone.toml"
    alone.write_text(file.read_text().partition("[grid]")[0] + '[output]\npath = "one.safetensors"\n')
    with pytest.raises(ConfigError, match=r"s\.toml:\d+: unknown key grid; it belongs to a sweep"):
        package.load_config(file)
    package.train(package.load_config(alone, [f"data.images={tmp_path / 'good'}"]), progress=Silence())
    same_but_for_times(tmp_path / "one.safetensors", folder / "images=good.safetensors", ignoring=NAMES)
    with (tmp_path / "out" / "results.csv").open(newline="") as table:
        assert [(row["run"], row["data.images"], row["state"]) for row in csv.DictReader(table)] == [
            ("images=good", "good", "done"),
            ("images=other", "other", "done"),
        ]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sweep(file) == runs
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ResumeError, match=r"train\.steps was 12, is now 13"):
        sweep(file, "train.steps=13")


def test_a_run_that_fails_stops_no_other_and_is_retried_when_asked(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lock of another machine is what no check of a sweep knows of."""
    file = write_sweep(tmp_path, tiny_base, "good", "other", steps=2)
    lock = tmp_path / "out" / "images=good" / "images=good.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": 1.0}))
    command = ["sweep", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"]
    for number in range(2):
        assert app(command, standalone_mode=False) == 1
        table, errors = capsys.readouterr()
        assert "error: images=good: images=good.safetensors: process 7 on elsewhere is writing it" in errors
        assert "1 of 2 runs failed; --retry runs them again" in errors
        assert [line.split()[:2] for line in table.splitlines()[1:3]] == [
            ["images=good", "failed"],
            ["images=other", "done"],
        ]
        # The second call does not try again.
        assert (lock.parent / "log.txt").read_text().count("elsewhere") == 1, number
    lock.unlink()
    assert not app([*command, "--retry", "--json"], standalone_mode=False)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["done"], answer["failed"]) == (2, 0)
    assert [run["message"] for run in answer["runs"]] == ["", ""]


@pytest.mark.skipif(os.name != "posix", reason="signals are sent to processes")
def test_ctrl_c_stops_after_a_save_leaves_no_process_and_the_same_command_goes_on(
    tiny_base: Path, tmp_path: Path
) -> None:
    file = write_sweep(tmp_path, tiny_base, "good", steps=60)
    command = [sys.executable, "-m", "sdlora.cli", "sweep", str(file), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "out" / "images=good"
    try:
        deadline = time.monotonic() + 200
        while not list(folder.glob("*.resume/step-*.safetensors")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopped; 0 of 1 runs are done; run the same command to go on" in errors
    assert children
    assert not any(child.is_running() for child in children)
    runs = read_results(tmp_path / "out")
    kept = runs[folder.name].steps
    assert [run.state for run in runs.values()] == ["stopped"]
    assert 2 <= kept < 60
    assert f"stopped after step {kept}" in (folder / "log.txt").read_text()
    assert sorted(path.name for path in tmp_path.rglob("*.lock")) == []

    runs = sweep(file)
    assert [(run.state, run.steps) for run in runs.values()] == [("done", 60)]
    assert json.loads((folder / "answer.json").read_text())["resumed_from"] == kept
    # The loss of the last 6 steps, and the time of both calls.
    with (folder / "images=good.log.csv").open(newline="") as table:
        losses = [float(row["loss"]) for row in csv.DictReader(table)]
    assert runs[folder.name].loss == pytest.approx(sum(losses[-6:]) / 6)
    assert len(losses) == 60
