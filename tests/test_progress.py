"""Reports of long work to a function, and stopping it from another thread."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch

import sdlora
from sdlora.errors import Interrupted
from sdlora.progress import CallbackProgress, Lines, ProgressUpdate, progress_or_bar
from tests.training_runs import STEPS, config_for, same_but_for_times


def test_a_callback_receives_every_report_of_a_run(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    updates: list[ProgressUpdate] = []
    config = config_for(tiny_base, finished[0], tmp_path / "x.safetensors", "samples.prompts=['a fox']")
    sdlora.train(config, progress=CallbackProgress(updates.append))
    tasks = list(dict.fromkeys(update.task for update in updates))
    assert tasks.index("Encoding images") < tasks.index("Training") < tasks.index("Generating")
    training = [(update.done, update.total) for update in updates if update.task == "Training"]
    assert training == [(0, STEPS), (10, STEPS), (STEPS, STEPS)]
    assert all(
        re.fullmatch(r"loss \d\.\d{4}", update.note) for update in updates if update.task == "Training" and update.done
    )
    generating = [update.done for update in updates if update.task == "Generating"]
    assert generating == list(range(21))
    for task in tasks:
        last = [update for update in updates if update.task == task][-1]
        assert last.done == last.total, task


def test_a_run_is_stopped_from_another_thread_and_resumed(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    """The training runs in a thread of its own, as in a web page; the run that follows in the main thread resumes it."""
    output, stop, outcome = tmp_path / "x.safetensors", threading.Event(), []
    training = threading.Event()
    config = config_for(tiny_base, finished[0], output, "train.steps=30", "train.save_every=100")

    def watch(update: ProgressUpdate) -> None:
        if update.task == "Training" and update.done:
            training.set()
            stop.wait(60)

    def work() -> None:
        try:
            sdlora.train(config, progress=CallbackProgress(watch), stop=stop)
        except Interrupted as interruption:
            outcome.append(str(interruption))

    worker = threading.Thread(target=work)
    worker.start()
    assert training.wait(120)
    stop.set()
    worker.join(120)
    assert outcome == ["stopped after step 10 of 30; run the same command to resume"]
    assert not output.exists()
    assert [file.name for file in (tmp_path / "x.resume").iterdir()] == ["step-00000010.safetensors"]
    assert sdlora.train(config).result.resumed_from == 10
    whole = tmp_path / "whole" / "x.safetensors"
    sdlora.train(config_for(tiny_base, finished[0], whole, "train.steps=30", "train.save_every=100"))
    same_but_for_times(whole, output)


def test_a_resumed_run_reports_where_it_is(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    stop, updates = threading.Event(), []
    config = config_for(tiny_base, finished[0], tmp_path / "x.safetensors", "train.steps=25")
    stop.set()
    with pytest.raises(Interrupted, match="before the first step"):
        sdlora.train(config, stop=stop)
    stop.clear()

    def stop_at_step_20(update: ProgressUpdate) -> None:
        if (update.task, update.done) == ("Training", 20):
            stop.set()

    with pytest.raises(Interrupted, match="after step 20 of 25"):
        sdlora.train(config, progress=CallbackProgress(stop_at_step_20), stop=stop)
    (tmp_path / "x.resume" / "step-00000020.safetensors").unlink()
    sdlora.train(config, progress=CallbackProgress(updates.append))
    assert [(u.done, u.total) for u in updates if u.task == "Training"] == [(18, 25), (20, 25), (25, 25)]


def test_generating_stops_between_steps(tiny_base: Path) -> None:
    stop, updates = threading.Event(), []

    def watch(update: ProgressUpdate) -> None:
        updates.append(update)
        if update.done == 3:
            stop.set()

    options = {"base": str(tiny_base), "steps": 8, "seed": 1}
    with pytest.raises(Interrupted, match="stopped while generating"):
        sdlora.generate("a fox", progress=CallbackProgress(watch), stop=stop, **options)  # ty: ignore[invalid-argument-type]
    assert [(update.done, update.total) for update in updates] == [(0, 8), (1, 8), (2, 8), (3, 8)]
    stop.clear()
    (again,) = sdlora.generate("a fox", stop=stop, **options)  # ty: ignore[invalid-argument-type]
    (plain,) = sdlora.generate("a fox", **options)  # ty: ignore[invalid-argument-type]
    assert torch.equal(again.latents, plain.latents)


def test_a_strip_stops_between_columns(finished: tuple[Path, Path], tiny_base: Path) -> None:
    stop = threading.Event()
    starts: list[str] = []

    def watch(update: ProgressUpdate) -> None:
        if update.done == 0:
            starts.append(update.task)
        if len(starts) == 2:
            stop.set()

    with pytest.raises(Interrupted):
        sdlora.generate_strip(
            ["zorb"], base=str(tiny_base), loras=[str(finished[1])], steps=2,
            progress=CallbackProgress(watch), stop=stop,
        )  # fmt: skip
    assert starts == ["Generating", "Generating"]


def test_without_a_terminal_quick_work_shows_nothing(capsys: pytest.CaptureFixture[str], tiny_base: Path) -> None:
    with progress_or_bar(None) as reports:
        assert isinstance(reports, Lines)
    sdlora.generate("a fox", base=str(tiny_base), steps=1)
    assert capsys.readouterr() == ("", "")
