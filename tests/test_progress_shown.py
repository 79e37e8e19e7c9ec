"""What is seen of long work: in a terminal, in a log, in a notebook, and in none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import nbformat
import pytest
from nbclient import NotebookClient

import sdlora as package
from sdlora import progress
from sdlora.progress import Lines
from tests.conftest import ROOT, write_images
from tests.terminal import in_a_terminal, screen
from tests.training_runs import STEPS, overrides

BAR = "━"


class Clock:
    """Replaces ``time`` in ``progress``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_a_screen_is_read_as_a_terminal_shows_it() -> None:
    assert screen("one\r\ntwo\r\x1b[2K\x1b[1A\x1b[2Knew\r\nxyz\rab\x1b[1m!\x1b[0m") == ["new", "ab!"]
    assert screen("x" * 81) == ["x" * 80, "x"]


def test_in_a_terminal_lines_of_a_training_stay_clean(tiny_base: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "set")
    shutil.copy(images / "0.png", images / "1.png")
    settings = overrides(tiny_base, images, tmp_path / "x.safetensors", "samples.prompts=['a fox']")
    code, lines = in_a_terminal("train", *settings, cwd=tmp_path)
    assert code == 0, lines
    summary = [number for number, line in enumerate(lines) if re.match(r"5 images: |warning: ", line)]
    assert len(summary) >= 2, lines
    for number, line in enumerate(lines):
        assert not (BAR in line and re.search("images:|warning|caption|safetensors", line)), line
        assert len(re.findall(r"\d+/\d+", line)) <= (BAR in line) or number in summary, line
    for task in ("Examining images", "Training", "Generating"):
        assert sum(line.startswith(task) and BAR in line for line in lines) == 1, lines
    # Every bar is whole, and comes after everything that was said at the start.
    assert max(summary) < min(number for number, line in enumerate(lines) if BAR in line)
    assert any(re.match(rf"Training +{BAR}+ {STEPS}/{STEPS} ", line) for line in lines), lines


def test_in_a_terminal_lines_of_lint_stay_clean(tmp_path: Path) -> None:
    write_images(tmp_path / "set")
    code, lines = in_a_terminal("lint", "set", "--trigger", "zorb", "--sheet", "sheet.png", cwd=tmp_path)
    assert code == 0, lines
    bars = [number for number, line in enumerate(lines) if BAR in line]
    assert [re.split(rf" +{BAR}", lines[number])[0] for number in bars] == [
        "Examining images",
        "Drawing the contact sheet",
    ]
    assert max(bars) < next(number for number, line in enumerate(lines) if line.startswith("5 images: "))
    assert lines.count("sheet.png: contact sheet") == 1


def test_a_log_has_the_start_and_the_end_of_each_phase(
    tiny_base: Path, tmp_path: Path, sdlora: Callable[..., CompletedProcess[str]]
) -> None:
    images = write_images(tmp_path / "set")
    settings = overrides(tiny_base, images, tmp_path / "x.safetensors", "samples.prompts=['a fox']")
    result = sdlora("train", *settings, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == STEPS
    assert result.stdout.count("\n") == 1
    lines = result.stderr.splitlines()
    assert "\x1b" not in result.stderr
    assert "\r" not in result.stderr
    assert lines[0].startswith("Examining images: 5 of 5")
    assert lines[1].startswith("5 images: ")
    assert f"Training: 0 of {STEPS}" in lines
    for task, total in (("Training", STEPS), ("Generating", 20)):
        assert any(re.match(rf"{task}: {total} of {total}, .*\d/s, 0:00:\d\d in all", line) for line in lines), lines


def test_a_long_task_has_a_line_every_tenth_or_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Lines() as lines:
        lines.say("100 images")
        lines.start("Training", 600, 200)
        for _ in range(400):
            clock.now += 1
            lines.advance(1, "loss 0.5")
        lines.start("Waiting", 1000)
        for _ in range(3):
            clock.now += 29
            lines.advance()
    errors = capsys.readouterr().err.splitlines()
    assert errors[:3] == [
        "100 images", "Training: 200 of 600", "Training: 230 of 600, loss 0.5, 1.00/s, 0:06:10 left"
    ]  # fmt: skip
    steps = [int(found[1]) for line in errors if (found := re.match(r"Training: (\d+) of", line))]
    assert steps == [*range(200, 600, 30), 600]
    assert errors[-4:] == [
        "Training: 600 of 600, loss 0.5, 1.00/s, 0:06:40 in all", "Waiting: 0 of 1000",
        "Waiting: 2 of 1000, 0.03/s, 8:02:22 left", "Waiting: 3 of 1000, 0.03/s, 8:01:53 left",
    ]  # fmt: skip


def test_a_task_by_the_tenth(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    with Lines() as lines:
        lines.say("start")
        lines.start("Encoding", 100)
        for _ in range(100):
            clock.now += 0.2
            lines.advance()
    done = [int(found[1]) for found in re.finditer(r"Encoding: (\d+) of", capsys.readouterr().err)]
    assert done == list(range(0, 101, 10))


def test_a_quick_task_at_the_beginning_is_not_reported_and_a_slow_one_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_HELD", 0.05)
    with Lines() as lines:
        lines.start("Examining", 3)
        lines.advance(3)
    assert capsys.readouterr().err == ""
    with Lines() as lines:
        lines.start("Captioning", 3)
        timer = lines._timer
        assert timer is not None
        timer.join(20)
        assert capsys.readouterr().err == "Captioning: 0 of 3\n"
        lines.advance(3)
        assert capsys.readouterr().err.startswith("Captioning: 3 of 3")
        lines.start("Stopped", 9)
        lines.advance(2)
    assert capsys.readouterr().err.startswith("Stopped: 0 of 9\nStopped: 2 of 9")


def test_a_notebook_has_a_bar_that_is_replaced_in_place() -> None:
    code = """
from sdlora.progress import progress_or_bar
with progress_or_bar(None) as bar:
    bar.start("Examining", 5)
    bar.advance(5)
    bar.start("Training", 600)
    for _ in range(600):
        bar.advance(1, "loss 0.1234")
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    (shown,) = notebook.cells[0].outputs
    first, second = shown["data"]["text/plain"].splitlines()
    assert re.match(rf"Examining  {progress._FULL * 30}  5/5  ", first)
    assert re.match(rf"Training  {progress._FULL * 30}  600/600  loss 0\.1234  .* in all", second)


def test_silence_is_silent(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "set")
    config = package.load_config(None, overrides(tiny_base, images, tmp_path / "x.safetensors", "train.steps=2"))
    package.train(config, progress=package.Silence())
    assert capsys.readouterr() == ("", "")
