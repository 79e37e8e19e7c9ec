"""More steps for a run that is there: as if it had been that long from the start, where the schedule says nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sdlora
from sdlora.cli.app import app
from sdlora.config.sections import Config, OptimizerSection
from sdlora.errors import ConfigError, ResumeError
from sdlora.formats.safetensors_file import read_header
from sdlora.training.checkpoint import RUN_KEY
from sdlora.training.length import Length
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.rates import rate_factor, steps_of
from sdlora.training.session import TrainingSession
from tests.conftest import write_images
from tests.training_runs import TIMES, config_for, everything, overrides

CONSTANT = ("optimizer.schedule=constant", "optimizer.warmup_steps=2", "output.log=true")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("five"), 5)


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch):
    take_step = TrainingSession.step

    def kill(stop: int | None) -> None:
        def step(self: TrainingSession, number: int) -> torch.Tensor:
            if number == stop:
                raise Killed
            return take_step(self, number)

        monkeypatch.setattr(TrainingSession, "step", step)

    return kill


def same_lora(one: Path, other: Path, but: Collection[str] = ()) -> None:
    """The tensors to the bit, and all that the files say, except when and in which parts they were made."""
    bytes_of = [file.read_bytes()[read_header(file, ResumeError).payload_start :] for file in (one, other)]
    assert bytes_of[0] == bytes_of[1]
    tables = [dict(read_header(file, ResumeError).metadata) for file in (one, other)]
    differing = {key for key in tables[0].keys() | tables[1].keys() if tables[0].get(key) != tables[1].get(key)}
    assert differing <= TIMES | {"sshs_legacy_hash", RUN_KEY, *but}


def log_of(output: Path) -> str:
    return output.with_suffix(".log.csv").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The settings of a run with everything on, and its file after 12 steps."""
    folder = tmp_path_factory.mktemp("whole")
    more = [*everything(folder), *CONSTANT, "output.title=x", "optimizer.ema=0.9"]
    sdlora.train(config_for(tiny_base, None, folder / "x.safetensors", *more, "train.steps=12"))
    return more, folder / "x.safetensors"


@pytest.fixture
def six_steps(whole: tuple[list[str], Path], tiny_base: Path, tmp_path: Path) -> Callable[..., Config]:
    """The same run of 6 steps, with its output in another folder."""
    return lambda *more: config_for(tiny_base, None, tmp_path / "x.safetensors", *whole[0], "train.steps=6", *more)


def test_an_extended_run_is_that_of_as_many_steps(whole: tuple[list[str], Path], six_steps, tmp_path: Path) -> None:
    output, said = tmp_path / "x.safetensors", []
    sdlora.train(six_steps())
    changed = ("samples.prompts=['a zorb']", "output.thumbnail=false", "train.save_every=4", "output.author=Bo")
    result = sdlora.train(six_steps(*changed), extend=6, say=said.append).result
    assert (result.steps, result.resumed_from) == (12, 6)
    assert any("12 steps (6 + 6)" in line for line in said)
    same_lora(whole[1], output, but={"modelspec.author"})
    assert output.with_suffix(".samples.png").exists()
    assert log_of(whole[1]) == log_of(output)
    # The same command without the option says that it is complete; texts may change.
    assert sdlora.train(six_steps("output.author=Ann")).result.texts_written


def test_an_extension_that_is_killed_goes_on(
    whole: tuple[list[str], Path], six_steps, tmp_path: Path, killed_at
) -> None:
    sdlora.train(six_steps())
    for stop, extend in ((9, 6), (11, None)):
        killed_at(stop)
        with pytest.raises(Killed):
            sdlora.train(six_steps(), extend=extend)
    killed_at(None)
    assert sdlora.train(six_steps(), extend=6).result.resumed_from == 10
    same_lora(whole[1], tmp_path / "x.safetensors")


def test_a_half_done_run_can_be_extended(whole: tuple[list[str], Path], six_steps, tmp_path: Path, killed_at) -> None:
    killed_at(4)
    with pytest.raises(Killed):
        sdlora.train(six_steps())
    killed_at(None)
    result = sdlora.train(six_steps(), extend=6).result
    assert (result.resumed_from, result.steps) == (4, 12)
    same_lora(whole[1], tmp_path / "x.safetensors")


def test_a_run_can_be_extended_twice(whole: tuple[list[str], Path], six_steps, tmp_path: Path) -> None:
    for steps in (None, 2, 4):
        sdlora.train(six_steps(), extend=steps)
    same_lora(whole[1], tmp_path / "x.safetensors")
    assert json.loads(read_header(tmp_path / "x.safetensors", ResumeError).metadata[RUN_KEY])["extended"] == [2, 4]


def test_an_extension_changes_no_step_before_it(tiny_base: Path, images: Path, tmp_path: Path, killed_at) -> None:
    """With a falling schedule too, whether the run is finished or half-done when it is extended."""
    finished, half = tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors"
    shares = ("optimizer.text_encoder_stop=0.5", "optimizer.warmup_steps=0.34", "optimizer.schedule=polynomial")
    more = ("train.steps=6", "output.log=true", "output.title=x", *shares)
    sdlora.train(config_for(tiny_base, images, finished, *more))
    sdlora.train(config_for(tiny_base, images, finished, *more), extend=4)
    killed_at(3)
    with pytest.raises(Killed):
        sdlora.train(config_for(tiny_base, images, half, *more))
    killed_at(None)
    sdlora.train(config_for(tiny_base, images, half, *more), extend=4)
    same_lora(finished, half)
    rates = [float(line.split(",")[2]) / 1e-2 for line in log_of(finished).splitlines()[1:]]
    # Two steps of warm-up and a line to 0 at step 6; from there the line that starts after three steps and ends at step 10.
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4, 4 / 7, 3 / 7, 2 / 7, 1 / 7], rel=1e-5)
    encoder = [float(line.split(",")[3]) for line in log_of(finished).splitlines()[1:]]
    assert [rate > 0 for rate in encoder] == [True] * 3 + [False] * 7
    stated = read_header(finished, ResumeError).metadata
    names = ("ss_lr_scheduler", "ss_lr_warmup_steps", "ss_max_train_steps", "ss_steps")
    assert [stated[name] for name in names] == ["polynomial", "2", "10", "10"]


HALF = 0.5 * (1 + math.cos(math.pi * 0.5))


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        # Factors in the steps 5, 10 and 15 of 10 + 10, without warm-up, by hand: planned ends at 10, the whole at 20.
        ({"schedule": "constant"}, 1.0, (1.0, 1.0)),
        ({"schedule": "linear"}, 0.5, (0.5, 0.25)),
        ({"schedule": "cosine"}, HALF, (HALF, 0.5 * (1 - math.sqrt(0.5)))),
        ({"schedule": "cosine_with_restarts", "schedule_cycles": 2}, 1.0, (1.0, HALF)),
        ({"schedule": "polynomial", "schedule_power": 2.0}, 0.25, (0.25, 0.0625)),
    ],
)
def test_the_schedule_of_an_extension_is_that_of_the_whole(
    settings: dict[str, object], before: float, after: tuple[float, float]
) -> None:
    section, length = OptimizerSection(warmup_steps=0, **settings), Length.of(10, (10,))  # ty: ignore[invalid-argument-type]
    factors = [rate_factor(step, section, steps=length.in_force(step)) for step in (5, 10, 15)]
    assert factors == pytest.approx([before, *after], abs=1e-12)


def test_a_share_of_the_steps_after_an_extension() -> None:
    length = Length.of(100, (100, 50))
    assert [length.in_force(step) for step in (0, 99, 100, 199, 200, 249)] == [100, 100, 200, 200, 250, 250]
    share, count = OptimizerSection(text_encoder_stop=0.4), OptimizerSection(text_encoder_stop=120)
    assert [steps_of("text_encoder", each, steps=250, planned=100) for each in (share, count)] == [40, 120]
    assert steps_of("unet", share, steps=250, planned=100) == 250
    # A warm-up in steps is over; one as a share counts from the whole of the longer run.
    warm = OptimizerSection(schedule="constant", warmup_steps=0.6)
    assert [rate_factor(step, warm, steps=length.in_force(step)) for step in (60, 100, 120)] == [1.0, 101 / 121, 1.0]


def test_the_optimizer_takes_the_rates_of_each_part() -> None:
    section = OptimizerSection(schedule="linear", warmup_steps=0, weight_decay=0.0, max_grad_norm=1e9)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, moved = GuardedAdamW([weight], [1e-2], section, steps=4, earlier=[2]), []
    for step in range(4):
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step(step)
        moved.append((before - weight.item()) / 1e-2)
    assert moved == pytest.approx([1.0, 0.5, 0.5, 0.25], rel=1e-4)  # AdamW moves by the rate under a constant gradient.


def test_what_cannot_be_extended_says_what_to_do(tiny_base: Path, images: Path, tmp_path: Path, killed_at) -> None:
    output = tmp_path / "x.safetensors"
    config = config_for(tiny_base, images, output, "train.steps=3")

    def refused(steps: int, *more: str) -> str:
        with pytest.raises(ResumeError) as caught:
            sdlora.train(config_for(tiny_base, images, output, "train.steps=3", *more), extend=steps)
        assert len(caught.value.problems) == 1
        return str(caught.value)

    assert refused(2).endswith("there is no run to extend yet; start it without --extend")
    sdlora.train(config)
    assert "train.seed was 0, is now 4" in refused(2, "train.seed=4")
    killed_at(4)
    with pytest.raises(Killed):
        sdlora.train(config_for(tiny_base, images, output, "train.steps=3", "train.save_every=1"), extend=2)
    killed_at(None)
    assert "its extension by 2 steps is not finished; run the command without --extend to finish it" in refused(3)
    assert sdlora.train(config).result.steps == 5
    state = tmp_path / "x.resume" / "last.safetensors"
    assert [file.name for file in state.parent.iterdir()] == [state.name]
    assert "parameter.0" in load_file(state)
    state.unlink()
    before = output.read_bytes()
    text = refused(4)
    assert "the state after its last step was not kept" in text
    assert "train.steps=9 --restart" in text
    assert output.read_bytes() == before
    assert sdlora.train(config).result.loss is None  # Still complete.


def test_the_last_state_is_kept_only_if_it_is_wanted(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    sdlora.train(config_for(tiny_base, images, output, "train.steps=2", "train.keep_state=false"))
    assert not (tmp_path / "x.resume").exists()
    with pytest.raises(ResumeError, match="was not kept"):
        sdlora.train(config_for(tiny_base, images, output, "train.steps=2"), extend=2)


def test_the_state_of_a_file_that_is_gone_is_in_nobodys_way(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    sdlora.train(config_for(tiny_base, images, output, "train.steps=2"))
    output.unlink()
    other = config_for(tiny_base, images, output, "train.steps=2", "train.seed=4")
    assert sdlora.train(other).result.resumed_from == 0
    assert sdlora.train(other, extend=1).result.steps == 3


def test_the_command(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    given = overrides(tiny_base, images, tmp_path / "x.safetensors", "train.steps=2")
    assert CliRunner().invoke(app, ["train", *given]).exit_code == 0
    answer = CliRunner().invoke(app, ["train", *given, "--extend", "2", "--json"])
    assert (json.loads(answer.stdout)["steps"], json.loads(answer.stdout)["resumed_from"]) == (4, 2)
    both = CliRunner().invoke(app, ["train", *given, "--extend", "2", "--restart"])
    assert (both.exit_code, "--restart starts over; give one of them" in both.output) == (1, True)
    with pytest.raises(ConfigError, match="--extend 0: expected a whole number of steps, at least 1"):
        sdlora.train(config_for(tiny_base, images, tmp_path / "x.safetensors"), extend=0)
