"""The validation loss in the course of a run: values and intervals, where it stops, and which weights it keeps."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import sdlora
from sdlora.errors import ConfigError, ResumeError
from sdlora.formats.safetensors_file import read_header
from sdlora.training import loop, validation_course
from sdlora.training.curve import loss_curve
from sdlora.training.interval import half_width, student_t
from sdlora.training.records import VALIDATION_HEADER
from sdlora.training.session import TrainingSession
from sdlora.training.validation_record import ValidationRecord
from tests.conftest import write_images
from tests.test_exports import payload, stopped_after
from tests.training_runs import config_for, same_but_for_times, toml

FALLING = [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0]
"""Made-up losses after 0, 2, 4 … 12 steps."""
RISING = [4.0, 3.0, 2.0, 2.5, 2.6, 2.7, 2.8]


T_TABLE = {
    1: 12.7062047362, 2: 4.3026527297, 3: 3.1824463053, 6: 2.4469118511, 11: 2.2009851601, 39: 2.0226909200,
    199: 1.9719565443,
}  # fmt: skip
"""Degrees of freedom -> the 97.5 % quantile of Student's distribution, as tables have it (SciPy's, to ten digits)."""


def error_of_mean(values: np.ndarray) -> float:
    return math.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1) / len(values))


@pytest.fixture
def sets(finished: tuple[Path, Path], tmp_path: Path) -> str:
    held = write_images(tmp_path / "held", 3, sizes=((64, 64), (60, 100)))
    return f"data.sets={toml([{'images': str(finished[0])}, {'images': str(held), 'role': 'validation'}])}"


def made_up(monkeypatch: pytest.MonkeyPatch, means: list[float], *, every: int = 2, spread: float = 0.0) -> list[int]:
    """Measurements of 3 images have these means from here on, with the same spread each time; returns their steps."""
    measured: list[int] = []
    measure = validation_course.ValidationCourse.measure

    def noting(self: Any, done: int, *rest: Any) -> None:
        measured.append(done)
        measure(self, done, *rest)

    def losses(*_: object) -> np.ndarray:
        images = np.array([[0.5], [-0.5], [0.0]]) + spread * math.cos(measured[-1]) * np.array([[1.0], [-1.0], [0.0]])
        return np.repeat(means[measured[-1] // every] + images, 4, 1).astype(np.float32)

    monkeypatch.setattr(validation_course, "validation_losses", losses)
    monkeypatch.setattr(validation_course.ValidationCourse, "measure", noting)
    return measured


@pytest.mark.parametrize("freedom", T_TABLE)
def test_intervals_are_those_of_students_distribution(freedom: int) -> None:
    assert student_t(freedom) == pytest.approx(T_TABLE[freedom], rel=1e-9)
    values = np.random.default_rng(freedom).gamma(2, 0.1, freedom + 1)
    assert half_width(values) == pytest.approx(T_TABLE[freedom] * error_of_mean(values), rel=1e-9)
    assert half_width(values[:1]) is None


def test_it_is_measured_on_the_way_and_changes_nothing(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, sets: str
) -> None:
    output, called = tmp_path / "x.safetensors", list[ValidationRecord]()
    ema = "optimizer.ema=0.6"
    plain = sdlora.train(config_for(tiny_base, None, tmp_path / "plain" / "x.safetensors", sets, ema)).result
    config = config_for(tiny_base, None, output, sets, ema, "validation.every=5", "output.log=true")
    result = sdlora.train(config, on_validation=called.append).result
    assert (result.loss, result.validation_loss, result.file_step) == (plain.loss, plain.validation_loss, 12)
    assert payload(output) == payload(plain.output)
    assert [record.step for record in called] == [0, 5, 10, 12]
    assert called[-1].loss == plain.validation_loss
    short = config_for(tiny_base, None, tmp_path / "short.safetensors", sets, ema, "train.steps=5")
    # Both warm up for more steps than they have, so their first 5 are the same.
    assert called[1].loss == sdlora.train(short).result.validation_loss
    assert called[0].loss != called[1].loss
    rows = list(csv.DictReader((tmp_path / "x.validation.csv").read_text().splitlines()))
    for row, record in zip(rows, called, strict=True):
        assert int(row["step"]) == record.step
        for key in ("loss", "interval", "difference", "difference_interval"):
            assert float(row[key]) == pytest.approx(getattr(record, key), rel=1e-6)
    assert called[0].difference == 0
    assert called[1].difference == pytest.approx(called[1].loss - called[0].loss, rel=1e-3)
    assert called[1].interval > called[1].difference_interval > 0
    words = {element.text for element in ElementTree.parse(tmp_path / "x.log.svg").findall(".//{*}text")}
    assert "validation" in words
    metadata = read_header(output, ResumeError).metadata
    assert metadata["ss_validate_every_n_steps"] == "5"


def test_records_are_those_of_the_losses(
    tiny_base: Path, tmp_path: Path, sets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, called = made_up(monkeypatch, RISING, spread=0.2), list[ValidationRecord]()
    config = config_for(tiny_base, None, tmp_path / "x.safetensors", sets, "validation.every=2")
    result = sdlora.train(config, on_validation=called.append).result
    assert measured == [0, 2, 4, 6, 8, 10, 12]
    assert [record.best for record in called] == [False, True, True, False, False, False, False]
    for record, mean in zip(called, RISING, strict=True):
        spread = 0.2 * math.cos(record.step)
        images = np.array([0.5 + spread, -0.5 - spread, 0.0]) + mean
        first = np.array([0.7, -0.7, 0.0]) + RISING[0]
        best = np.array([0.5 + 0.2 * math.cos(4), -0.5 - 0.2 * math.cos(4), 0]) + RISING[2]
        assert record.loss == pytest.approx(mean, rel=1e-6)
        assert record.interval == pytest.approx(T_TABLE[2] * error_of_mean(images), rel=1e-5)
        assert record.difference == pytest.approx(mean - RISING[0], rel=1e-5)
        expected = T_TABLE[2] * error_of_mean(images - first)
        assert record.difference_interval == pytest.approx(expected, rel=1e-4, abs=1e-6)
        if record.step > 4:
            assert record.risen == ((images - best).mean() / error_of_mean(images - best) > T_TABLE[2])
    assert {record.risen for record in called} == {True, False}
    assert (result.steps, result.file_step, result.validation_loss) == (12, 12, called[-1].loss)


@pytest.mark.parametrize("ema", ["0", "0.5"])
def test_it_stops_when_the_loss_has_risen_and_keeps_the_best(
    tiny_base: Path, tmp_path: Path, sets: str, monkeypatch: pytest.MonkeyPatch, ema: str
) -> None:
    """Steps 6 and 8 are higher than step 4, so it stops at 8; the file is that of a run of 4 steps."""
    output, short = tmp_path / "x.safetensors", tmp_path / "short.safetensors"
    settings = (sets, f"optimizer.ema={ema}", "train.save_every=100")
    sdlora.train(config_for(tiny_base, None, short, *settings, "train.steps=4"))
    measured = made_up(monkeypatch, RISING)
    config = config_for(tiny_base, None, output, *settings, "validation.every=2", "validation.stop=2")
    called: list[int] = []
    result = sdlora.train(config, on_step=lambda record: called.append(record.step)).result
    assert measured == [0, 2, 4, 6, 8]
    assert called == list(range(1, 9))
    assert (result.steps, result.file_step, result.validation_loss) == (8, 4, 2.0)
    assert payload(output) == payload(short)
    metadata = read_header(output, ResumeError).metadata
    assert (metadata["ss_steps"], metadata["ss_max_train_steps"]) == ("4", "12")
    assert float(metadata["sdlora_validation_loss"]) == 2.0
    again = sdlora.train(config).result
    assert (again.loss, again.resumed_from) == (None, 0)
    assert measured == [0, 2, 4, 6, 8]


def test_a_loss_that_does_not_rise_stops_nothing(
    tiny_base: Path, tmp_path: Path, sets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that rises by no more than the images vary."""
    settings = (sets, "validation.every=2", "validation.stop=1")
    with monkeypatch.context() as patch:
        made_up(patch, FALLING)
        result = sdlora.train(config_for(tiny_base, None, tmp_path / "a.safetensors", *settings)).result
    assert (result.steps, result.file_step, result.validation_loss) == (12, 6, 1.0)
    made_up(monkeypatch, [4.0, 2.0, *[2.1] * 5], spread=2.0)
    result = sdlora.train(config_for(tiny_base, None, tmp_path / "b.safetensors", *settings)).result
    assert (result.steps, result.file_step, result.validation_loss) == (12, 2, 2.0)


def test_the_measurement_before_the_first_step_is_never_kept_and_nan_counts_as_risen(
    tiny_base: Path, tmp_path: Path, sets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, [0.1, 3.0, math.nan, 3.5, 1.0, 1.0, 1.0])
    config = config_for(
        tiny_base, None, tmp_path / "x.safetensors", sets, "validation.every=2", "validation.stop=2", "output.log=true"
    )
    result = sdlora.train(config).result
    assert (result.steps, result.file_step) == (6, 2)
    ElementTree.parse(tmp_path / "x.log.svg")


@pytest.mark.parametrize("last", [3, 7, 9])
def test_killed_and_resumed_it_ends_the_same(
    tiny_base: Path, tmp_path: Path, sets: str, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """The best step, 4, is before or after the checkpoint from which the run is resumed."""
    whole, output = tmp_path / "whole" / "x.safetensors", tmp_path / "x.safetensors"
    settings = (sets, "train.save_every=3", "validation.every=2", "validation.stop=3", "output.log=true")
    made_up(monkeypatch, RISING)
    expected = sdlora.train(config_for(tiny_base, None, whole, *settings)).result
    assert (expected.steps, expected.file_step) == (10, 4)
    with monkeypatch.context() as patch:
        stopped_after(patch, last)
        with pytest.raises(InterruptedError):
            sdlora.train(config_for(tiny_base, None, output, *settings))
    result = sdlora.train(config_for(tiny_base, None, output, *settings)).result
    assert result.resumed_from == last // 3 * 3
    assert (result.steps, result.file_step, result.validation_loss) == (10, 4, 2.0)
    same_but_for_times(whole, output)
    logs = [(file.with_suffix(".validation.csv")).read_text() for file in (whole, output)]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 7


def test_a_run_that_had_stopped_does_no_further_step(
    tiny_base: Path, tmp_path: Path, sets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file could not be written the first time."""
    output = tmp_path / "x.safetensors"
    config = config_for(tiny_base, None, output, sets, "validation.every=2", "validation.stop=1")
    made_up(monkeypatch, RISING)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_run_file", full)
        with pytest.raises(sdlora.SdloraError, match="No space left"):
            sdlora.train(config)
    monkeypatch.setattr(TrainingSession, "step", None)
    result = sdlora.train(config).result
    assert (result.resumed_from, result.steps, result.file_step, result.loss) == (6, 6, 4, None)


def test_weights_are_held_for_a_while_and_come_back_to_the_bit(
    tiny_base: Path, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    from tests.training_runs import session_for

    session = session_for(tiny_base, finished[0], tmp_path / "x.safetensors")
    own = [parameter.detach().clone() for parameter in session.adapter.parameters]
    with session.attached():
        session.step(0)
        after = [parameter.detach().clone() for parameter in session.adapter.parameters]
        with session.holding(own):
            held = [parameter.detach().clone() for parameter in session.adapter.parameters]
        back = [parameter.detach().clone() for parameter in session.adapter.parameters]
    assert all(map(torch.equal, held, own))
    assert all(map(torch.equal, back, after))
    assert not all(map(torch.equal, held, after))


def test_settings_that_do_not_work_are_reported_before_the_base_is_loaded(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "load_base", None)
    with pytest.raises(
        ConfigError, match=r'validation\.every = 2: there are no validation images; .*role = "validation"'
    ):
        sdlora.train(config_for(tiny_base, finished[0], tmp_path / "x.safetensors", "validation.every=2"))
    with pytest.raises(ConfigError, match=r"validation.stop = 2: validation\.every is 0"):
        config_for(tiny_base, finished[0], tmp_path / "x.safetensors", "validation.stop=2")


def test_when_it_is_measured_decides_resuming_only_where_it_can_stop_the_run(
    tiny_base: Path, tmp_path: Path, sets: str
) -> None:
    output = tmp_path / "x.safetensors"
    sdlora.train(config_for(tiny_base, None, output, sets, "train.steps=2"))
    recorded = json.loads(read_header(output, ResumeError).metadata["sdlora_run"])["config"]
    assert "validation.every" not in recorded
    assert sdlora.train(config_for(tiny_base, None, output, sets, "train.steps=2", "validation.every=1")).result
    stop = ("train.steps=2", "validation.stop=1")
    with pytest.raises(ResumeError, match=r"validation\.every was 0, is now 1; validation\.stop was 0, is now 1"):
        sdlora.train(config_for(tiny_base, None, output, sets, *stop, "validation.every=1"))


def test_a_file_of_another_program_is_left_alone(tiny_base: Path, tmp_path: Path, sets: str) -> None:
    other = tmp_path / "x.validation.csv"
    other.write_text("epoch;loss\n")
    config = config_for(
        tiny_base, None, tmp_path / "x.safetensors", sets, "validation.every=5", "output.log=true", "train.steps=2"
    )
    with pytest.raises(ResumeError, match=r"x\.validation\.csv: exists and is not the validation log"):
        sdlora.train(config)
    assert other.read_text() == "epoch;loss\n"
    other.write_text(VALIDATION_HEADER)
    sdlora.train(config)


def test_measurements_of_a_curve_are_within_its_frame() -> None:
    def record(step: int, loss: float, interval: float | None) -> ValidationRecord:
        return ValidationRecord(
            step=step, loss=loss, interval=interval, difference=0.0, difference_interval=None, best=False, risen=False
        )

    points = [record(0, 0.4, 0.1), record(500, 90.0, 200.0), record(1000, math.nan, None), record(1500, 0.3, None)]
    text = loss_curve("x", range(1, 1001), [0.2] * 1000, points)
    (group,) = [each for each in ElementTree.fromstring(text).findall("{*}g") if each.get("stroke") == "#c2410c"]
    _, line, marks = (path.get("d") for path in group.findall("{*}path"))
    assert line.count("L") == 2
    places = [tuple(map(float, mark.removesuffix("h0").split())) for mark in marks.split("M")[1:]]
    assert all(84 <= x <= 960 - 28 and 62 <= y <= 480 - 62 for x, y in places)
    assert places[0][0] < places[1][0] < places[2][0] == 960 - 28
