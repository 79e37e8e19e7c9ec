"""Rows of the sample sheet while a run goes on: drawn from the weights of their step, never twice, and without a trace in
what is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdlora
from sdlora.errors import ConfigError
from sdlora.generation.alternatives import drawn
from sdlora.generation.grid import labelled_grid
from sdlora.training import loop, sample_sheet
from sdlora.training.plan import RunPlan, plan_config
from sdlora.training.sample_cells import SampleCells
from sdlora.training.samples import LARGEST_SHEET, reduced, sample_requests
from sdlora.training.saving import RunFiles
from sdlora.training.session import TrainingSession
from tests.conftest import write_images
from tests.training_runs import config_for, same_but_for_times

TWO = "samples.prompts=['a fox', 'a tower']"
QUICK = ("samples.steps=2", "train.steps=6", "train.save_every=4", TWO)


def drawn_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Step and numbers of the prompts of each drawing on the way from here on."""
    rows: list[tuple[int, list[int]]] = []
    draw = sample_sheet.SamplesOnTheWay._draw

    def noting(self: Any, done: int, missing: list[int], *rest: Any) -> None:
        rows.append((done, missing))
        draw(self, done, missing, *rest)

    monkeypatch.setattr(sample_sheet.SamplesOnTheWay, "_draw", noting)
    return rows


def killed_in(monkeypatch: pytest.MonkeyPatch, last: int) -> Callable[[], None]:
    """Step ``last`` (from 0) fails as if the process were killed, until what is returned is called."""
    step = TrainingSession.step

    def failing(self: TrainingSession, number: int) -> object:
        if number == last:
            raise InterruptedError
        return step(self, number)

    monkeypatch.setattr(TrainingSession, "step", failing)
    return lambda: monkeypatch.setattr(TrainingSession, "step", step)


def cells(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.iterdir())


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), np.int16)


def test_rows_show_their_step_and_change_nothing_that_is_trained(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    """The first row is what the base makes, the others what ``generate`` makes of the files of their steps."""
    plain, output = tmp_path / "plain" / "x.safetensors", tmp_path / "x.safetensors"
    settings = (
        *QUICK, "optimizer.ema=0.5", "optimizer.learning_rate=0.1", "optimizer.warmup_steps=0",
        "data.caption_dropout=0.2", "train.gradient_checkpointing=true",
    )  # fmt: skip
    expected = sdlora.train(config_for(tiny_base, images, plain, *settings)).result
    way = ("samples.every=2", "samples.at_first=true", "output.save_every=2", "samples.seed=7")
    result = sdlora.train(config_for(tiny_base, images, output, *settings, *way))
    assert result.result.loss == expected.loss
    thumbnail = {"modelspec.thumbnail"}
    same_but_for_times(plain, output, ignoring=thumbnail)

    assert cells(tmp_path / "x.samples") == [f"00000{step}-{n}" for step in (0, 2, 4) for n in (1, 2)]
    shown = []
    for step in (0, 2, 4):
        loras = [f"{tmp_path}/x-00000{step}.safetensors"] if step else []
        made = sdlora.generate(["zorb, a fox", "zorb, a tower"], base=str(tiny_base), loras=loras, seed=7, steps=2)
        row = [pixels(tmp_path / "x.samples" / f"00000{step}-{n}.png") for n in (1, 2)]
        for ours, other in zip(row, made, strict=True):
            assert np.abs(ours - np.asarray(other.image, np.int16)).max() <= 1
        shown.append(row)
    assert all(np.abs(shown[0][0] - row[0]).max() > 3 for row in shown[1:])
    final = sdlora.generate(["zorb, a fox", "zorb, a tower"], base=str(tiny_base), loras=[str(output)], seed=7, steps=2)
    rows = [[Image.fromarray(cell.astype(np.uint8)) for cell in row] for row in shown]
    sheet = labelled_grid(
        [*rows, [each.image for each in final]],
        columns=["zorb, a fox", "zorb, a tower"],
        row_labels=["step 0", "step 2", "step 4", "LoRA file"],
    )
    assert np.array_equal(pixels(tmp_path / "x.samples.png"), np.asarray(sheet, np.int16))


def test_a_resumed_run_draws_what_is_missing_and_nothing_twice(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rows = tmp_path / "x.safetensors", drawn_rows(monkeypatch)
    config = config_for(tiny_base, images, output, *QUICK, "samples.every=1")
    revive = killed_in(monkeypatch, 5)
    with pytest.raises(InterruptedError):
        sdlora.train(config)
    assert rows == [(step, [0, 1]) for step in range(1, 6)]
    first = pixels(tmp_path / "x.samples.png")
    (tmp_path / "x.samples" / "000004-2.png").unlink()
    (tmp_path / "x.samples" / "000003-1.png").write_bytes(b"torn")
    revive()
    rows.clear()
    sdlora.train(config)  # From step 4 on.
    assert rows == [(4, [1])]
    last = pixels(tmp_path / "x.samples.png")
    assert last.shape[0] == first.shape[0] + 64 + 6
    images_alone = slice(-2 * 64 - 6, None)
    torn = last[-4 * 70 + 6 :][:64, images_alone][:, :64]
    assert (torn == 255).all()  # Step 3 is before the checkpoint, so its image stays missing.
    assert np.array_equal(last[: -4 * 70, images_alone], first[: -3 * 70, images_alone])


def test_a_changed_prompt_is_drawn_again_and_a_finished_run_draws_its_last_row_again(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rows = tmp_path / "x.safetensors", drawn_rows(monkeypatch)
    revive = killed_in(monkeypatch, 5)
    with pytest.raises(InterruptedError):
        sdlora.train(config_for(tiny_base, images, output, *QUICK, "samples.every=2"))
    revive()
    rows.clear()
    changed = config_for(tiny_base, images, output, *QUICK, "samples.every=2", "samples.prompts=['a fox', 'a boat']")
    first = sdlora.train(changed).samples
    assert rows == [(4, [1])]
    assert first is not None
    with Image.open(first) as sheet:
        assert "a boat" in sheet.info["parameters"]
        assert "a tower" not in sheet.info["parameters"]
    assert sdlora.train(changed).samples is None
    assert sdlora.train(config_for(tiny_base, images, output, *QUICK)).samples == first
    with Image.open(first) as sheet:
        assert "a tower" in sheet.info["parameters"]


def test_restart_removes_the_images_of_earlier_runs_and_no_others(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    output, folder = tmp_path / "x.safetensors", tmp_path / "x.samples"
    sdlora.train(config_for(tiny_base, images, output, *QUICK, "samples.every=1"))
    (folder / "000001-9.png").write_bytes(b"of someone else")
    sdlora.train(config_for(tiny_base, images, output, *QUICK, "samples.every=4"), restart=True)
    assert cells(folder) == ["000001-9", "000004-1", "000004-2"]


def test_each_setting_is_that_of_the_request(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    def first(*more: str) -> Any:
        config = config_for(tiny_base, images, tmp_path / "x.safetensors", "train.seed=5", TWO, *more)
        return sample_requests(plan_config(config))[0]

    usual = first()
    assert (usual.prompt, usual.negative, usual.seed, usual.steps, usual.cfg, usual.size, usual.sampler) == (
        "zorb, a fox", "", 5, 20, 5.0, None, "dpm++2m",
    )  # fmt: skip
    own = first(
        "samples.negative=blurred", "samples.seed=9", "samples.steps=3", "samples.guidance=2.5",
        "samples.size=[64, 128]", "samples.sampler=Euler a", "samples.schedule=karras",
    )  # fmt: skip
    assert (own.negative, own.seed, own.steps, own.cfg, own.size, own.sampler, own.schedule) == (
        "blurred", 9, 3, 2.5, (64, 128), "euler-a", "karras",
    )  # fmt: skip
    assert first("samples.size=128").size == (128, 128)
    assert first("samples.seed=0").seed == 0
    chosen = first("samples.prompts=['a {fox|owl|cat}']")
    assert (chosen.prompt, chosen.prompt_template) == (
        drawn("zorb, a {fox|owl|cat}", Random(5)), "zorb, a {fox|owl|cat}",
    )  # fmt: skip


def test_settings_that_do_not_work_are_reported_before_the_base_is_loaded(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "load_base", None)
    config = config_for(tiny_base, images, tmp_path / "x.safetensors", TWO, "samples.size=63", "samples.sampler=magic")
    with pytest.raises(ConfigError) as caught:
        sdlora.train(config)
    size, sampler = caught.value.problems
    assert size.startswith("samples.size 63x63: ")
    assert sampler.startswith("samples.sampler 'magic' is unknown; choose one of ")


@pytest.mark.parametrize("fault", [RuntimeError("CUDA error"), OSError(28, "No space left on device")])
def test_rows_that_fail_are_a_warning_and_the_run_goes_on(
    fault: Exception,
    tiny_base: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise fault

    plain, output = tmp_path / "plain" / "x.safetensors", tmp_path / "x.safetensors"
    settings = (*QUICK, "samples.prompts=['a fox']")
    sdlora.train(config_for(tiny_base, images, plain, *settings))
    monkeypatch.setattr(SampleCells, "put", fail)
    report = sdlora.train(config_for(tiny_base, images, output, *settings, "samples.every=3"))
    assert [line for line in caplog.messages if "samples" in line] == [
        f"the samples of step 3 were not drawn ({fault}); the run goes on without them"
    ]
    assert report.samples is not None
    same_but_for_times(plain, output)


def test_epochs_count_as_steps(tiny_base: Path, tmp_path: Path) -> None:
    """5 images in batches of 2 are 3 steps."""
    images = write_images(tmp_path / "images", 5)

    def due(*more: str) -> tuple[list[int], list[int]]:
        plan: RunPlan = plan_config(config_for(tiny_base, images, tmp_path / "x.safetensors", TWO, *more))
        files = RunFiles.of(plan)
        return [n for n in range(13) if files.samples.due(n)], [n for n in range(13) if files.exports._due(n)]

    assert due("samples.every_epochs=2", "output.save_every_epochs=1") == ([6], [3, 6, 9])
    assert due("samples.every=4", "samples.every_epochs=1") == ([3, 4, 6, 8, 9], [])
    assert due("samples.at_first=true") == ([], [])
    assert due("samples.at_first=true", "samples.every=6") == ([0, 6], [])
    assert due("samples.every=6", "samples.prompts=[]") == ([], [])


def test_a_large_sheet_is_reduced() -> None:
    image = Image.new("RGB", (1024, 1024))
    assert reduced(image, images=22) is image
    smaller = reduced(image, images=100)
    assert 0.99 < 100 * smaller.width * smaller.height / LARGEST_SHEET < 1.01
