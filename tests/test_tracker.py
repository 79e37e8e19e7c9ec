"""Trackers receive every loss once, and nothing of them is imported, or able to end a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker

import sdlora
from sdlora.errors import ConfigError
from sdlora.training import loop, tracker
from tests.conftest import write_images
from tests.test_exports import payload, stopped_after
from tests.training_runs import STEPS, config_for, toml


class Recorder(GeneralTracker):
    """What is sent, in memory."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__()
        self.given, self.named = given, named
        self.logged: list[tuple[int | None, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}
        self.finished = 0

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The trackers that are made from here on."""
    made: list[Recorder] = []

    def make(*given: Any, **named: Any) -> Recorder:
        made.append(Recorder(*given, **named))
        return made[-1]

    for name in ("TensorBoardTracker", "WandBTracker"):
        monkeypatch.setattr(accelerate.tracking, name, make)
    monkeypatch.setattr(tracker, "find_spec", lambda _: True)
    return made


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_losses_rates_and_validation_are_sent_in_order_also_after_a_resume(
    kind: str,
    recorders: list[Recorder],
    finished: tuple[Path, Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in step 12; resumed from step 8."""
    held = write_images(tmp_path / "held", 2)
    sets = toml([{"images": str(finished[0])}, {"images": str(held), "role": "validation"}])
    config = config_for(
        tiny_base, None, tmp_path / "x.safetensors", f"data.sets={sets}", f"output.tracker={kind}", "validation.every=5",
        "train.save_every=8",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        stopped_after(patch, 11)
        with pytest.raises(InterruptedError):
            sdlora.train(config)
    called: list[Any] = []
    sdlora.train(config, on_step=called.append, on_validation=called.append)
    first, second = recorders
    assert (first.finished, second.finished) == (1, 1)
    for sent, steps, measured in ((first, range(1, 11), [0, 5, 10]), (second, range(9, STEPS + 1), [10, STEPS])):
        assert [step for step, values in sent.logged if "loss" in values] == list(steps)
        assert [step for step, values in sent.logged if "validation/loss" in values] == measured
        order = [step for step, _ in sent.logged]
        assert order == sorted(order)
    losses = [values["loss"] for _, values in second.logged if "loss" in values]
    rates = [values["learning_rate/unet"] for _, values in second.logged if "loss" in values]
    records = [record for record in called if hasattr(record, "learning_rate")]
    assert losses == [record.loss for record in records]
    assert rates == [record.learning_rate for record in records]
    assert [values["validation/loss"] for _, values in second.logged if "validation/loss" in values] == [
        record.loss for record in called if hasattr(record, "best")
    ]
    if kind == "tensorboard":
        assert first.given == ("x", tmp_path / "x.tracker")
        assert (first.named, second.named) == ({"purge_step": None}, {"purge_step": 9})
    else:
        assert first.given == ("sdlora",)
        assert first.named == second.named
        assert first.named["resume"] == "allow"
        assert first.settings["train.batch_size"] == "2"
        assert str(tmp_path) not in str(first.settings)
    assert payload(tmp_path / "x.safetensors") == payload(finished[1])


def test_a_tracker_that_fails_is_one_warning(
    recorders: list[Recorder],
    finished: tuple[Path, Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr(Recorder, "log", refuse)
    monkeypatch.setattr(Recorder, "finish", refuse)
    sdlora.train(config_for(tiny_base, finished[0], tmp_path / "x.safetensors", "output.tracker=wandb"))
    assert [line for line in caplog.messages if "tracker" in line] == [
        "output.tracker = wandb failed (no answer); the run goes on without it"
    ]
    assert payload(tmp_path / "x.safetensors") == payload(finished[1])


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_said_before_the_base_is_loaded(
    kind: str, finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "find_spec", lambda _: None)
    monkeypatch.setattr(loop, "load_base", None)
    with pytest.raises(ConfigError, match=rf"output\.tracker = \"{kind}\": .*pip install 'sdlora\[{kind}\]'"):
        sdlora.train(config_for(tiny_base, finished[0], tmp_path / "x.safetensors", f"output.tracker={kind}"))


def test_nothing_is_made_where_it_is_off(
    recorders: list[Recorder], finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    sdlora.train(config_for(tiny_base, finished[0], tmp_path / "x.safetensors", "train.steps=2"))
    assert recorders == []
    assert not (tmp_path / "x.tracker").exists()
    assert "wandb" not in sys.modules


def test_tensorboard_reads_what_was_sent(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    called: list[Any] = []
    config = config_for(tiny_base, finished[0], tmp_path / "x.safetensors", "output.tracker=tensorboard")
    sdlora.train(config, on_step=called.append)
    events = EventAccumulator(str(tmp_path / "x.tracker" / "x"))
    events.Reload()
    sent = [(event.step, event.value) for event in events.Scalars("loss")]
    assert sent == [(record.step, pytest.approx(record.loss, rel=1e-6)) for record in called]
    assert len(sent) == STEPS
