"""The log of the losses, its curve, and the callback: the same values, whole lines, in order, also after a resume."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import sdlora as package
from sdlora.errors import ResumeError
from sdlora.training.curve import loss_curve, moving_mean, window_of
from sdlora.training.plan import plan_config
from sdlora.training.records import HEADER, LossLog, Records, StepRecord
from sdlora.training.session import TrainingSession
from tests.test_exports import payload, stopped_after
from tests.training_runs import STEPS, config_for


def records(*steps: int) -> list[StepRecord]:
    return [StepRecord(step=step, loss=step / 8, learning_rate=1e-4, text_encoder_learning_rate=0.0) for step in steps]


def test_the_log_and_the_callback_have_each_step_also_after_a_resume(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 12, when steps 1 to 10 were logged; resumed from step 8."""
    output, called, returned = tmp_path / "x.safetensors", [], {}
    config = config_for(tiny_base, finished[0], output, "output.log=true", "train.save_every=4")
    take_step = TrainingSession.step

    def step(self: TrainingSession, number: int) -> object:
        loss = take_step(self, number)
        returned[number + 1] = loss.item()
        return loss

    monkeypatch.setattr(TrainingSession, "step", step)
    with monkeypatch.context() as patch:
        stopped_after(patch, 11)
        with pytest.raises(InterruptedError):
            package.train(config, on_step=called.append)
    log = tmp_path / "x.log.csv"
    assert [line[0] for line in csv.reader(log.read_text().splitlines())][1:] == [str(step) for step in range(1, 11)]
    assert [record.step for record in called] == list(range(1, 11))
    with log.open("a") as file:
        file.write("11,0.2")  # As a kill tears it.
    called.clear()
    assert package.train(config, on_step=called.append).result.resumed_from == 8
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [float(row["loss"]) for row in rows] == pytest.approx([returned[n] for n in range(1, STEPS + 1)], rel=1e-6)
    warm = config.optimizer.warmup_steps
    assert warm >= STEPS
    expected = [1e-2 * (n / (warm + 1)) for n in range(1, STEPS + 1)]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(expected, rel=1e-5)
    assert [float(row["text_encoder_learning_rate"]) for row in rows] == pytest.approx(
        np.array(expected) / 10, rel=1e-5
    )
    assert [record.step for record in called] == list(range(9, STEPS + 1))
    assert [record.loss for record in called] == [returned[n] for n in range(9, STEPS + 1)]
    curve = ElementTree.fromstring((tmp_path / "x.log.svg").read_text(encoding="utf-8"))
    assert len(curve.find("{*}polyline").get("points").split()) == STEPS
    assert payload(output) == payload(finished[1])


def test_without_it_there_is_no_log(finished: tuple[Path, Path]) -> None:
    assert not list(finished[1].parent.glob("x.log*"))


def test_lines_beyond_the_resumed_step_and_torn_ones_are_dropped(tmp_path: Path) -> None:
    log, file = LossLog(tmp_path / "x.safetensors"), tmp_path / "x.log.csv"
    log.open(0)
    assert file.read_text() == HEADER
    log.append(records(1, 2))
    log.append(records(3, 4, 5))
    whole = file.read_text()
    assert whole.splitlines()[3] == "3,0.375,0.0001,0"
    file.write_text(whole[:-3])
    for done, kept in ((5, [1, 2, 3, 4]), (2, [1, 2]), (0, [])):
        again = LossLog(tmp_path / "x.safetensors")
        again.open(done)
        assert [int(line.split(",")[0]) for line in file.read_text().splitlines()[1:]] == kept
    again.append(records(1, 2, 3, 4, 5))
    assert file.read_text() == whole


def test_a_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.log.csv").write_text("epoch;loss\n1;2\n")
    with pytest.raises(ResumeError, match=r"x\.log\.csv: exists and is not the loss log"):
        LossLog(tmp_path / "x.safetensors").open(0)
    assert (tmp_path / "x.log.csv").read_text() == "epoch;loss\n1;2\n"


def test_lines_that_could_not_be_written_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, file, opened = LossLog(tmp_path / "x.safetensors"), tmp_path / "x.log.csv", Path.open
    log.open(0)

    def full(self: Path, *mode: str, **more: object) -> object:
        if self == file:
            with opened(self, "ab") as torn:
                torn.write(b"1,0.1")
            raise OSError(28, "No space left on device")
        return opened(self, *mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        log.append(records(1))
        log.append(records(2))
    log.append(records(3))
    assert [line.split(",")[0] for line in file.read_text().splitlines()[1:]] == ["1", "2", "3"]
    assert caplog.messages == [f"{file} cannot be written (No space left on device); the run goes on"]


def test_the_line_of_the_curve_is_a_weighted_mean_of_neighbours() -> None:
    values = np.random.default_rng(0).gamma(2, 0.1, 90)
    values[[4, 50]] = math.nan, math.inf
    window = window_of(90)
    assert window == 9
    for place, mean in enumerate(moving_mean(values.tolist())):
        near = [n for n in range(90) if abs(n - place) <= window // 2 and math.isfinite(values[n])]
        weights = [math.exp(-(((n - place) / (window / 6)) ** 2) / 2) for n in near]
        expected = sum(w * values[n] for w, n in zip(weights, near, strict=True)) / sum(weights)
        assert mean == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("losses", [[], [0.5], [math.nan] * 3, [0.0, 0.0], [0.1] * 500 + [50.0], [1e-7, 3e4]])
def test_a_curve_of_any_losses_is_well_formed_and_within_its_frame(losses: list[float]) -> None:
    text = loss_curve("a < b & c", range(1, len(losses) + 1), losses)
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.findall(".//{*}text")]
    assert {"a < b & c", "step", "loss"} <= set(words)
    points = root.find("{*}polyline").get("points").split()
    assert len(points) == sum(map(math.isfinite, losses))
    width, height = float(root.get("width")), float(root.get("height"))
    dots = re.findall(r"M([\d.]+) ([\d.]+)h0", text)
    for x, y in [*dots, *(point.split(",") for point in points)]:
        assert 0 < float(x) < width
        assert 0 < float(y) < height
    assert any("1 loss above, up to 50" in word for word in words) == (50.0 in losses)


def test_the_rate_of_the_text_encoders_is_recorded_as_0_after_their_stop(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_base, finished[0], tmp_path / "x.safetensors", "optimizer.text_encoder_stop=2")
    called: list[StepRecord] = []
    Records(plan_config(config), called.append).add(0, [0.1] * 4)
    assert [record.text_encoder_learning_rate > 0 for record in called] == [True, True, False, False]
    assert all(record.learning_rate > 0 for record in called)
