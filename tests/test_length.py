"""The length of a run in epochs: how many steps that is, where it is said, and that it is the same run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sdlora
from sdlora.cli.app import app
from sdlora.errors import ConfigError
from sdlora.formats.metadata_file import read_metadata
from sdlora.training.batches import BatchPlan
from sdlora.training.checkpoint import Checkpoint, RunFolder
from sdlora.training.extension import continued
from sdlora.training.length import Length, length_in_words, planned_steps
from sdlora.training.plan import RunPlan, plan_config
from tests.conftest import write_images
from tests.training_runs import overrides, same_but_for_times

NEEDED = ("data.images=images", "data.trigger=zorb", "output.path=x.safetensors")


def given(base: Path, images: Path, output: Path, *more: str) -> list[str]:
    """Without ``train.steps``."""
    others = [each for each in overrides(base, images, output) if not each.startswith("train.steps=")]
    return [*others, *more]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 images, which in batches of 2 are 3 steps an epoch."""
    return write_images(tmp_path_factory.mktemp("five"), 5)


def planned(base: Path, images: Path, *more: str) -> RunPlan:
    return plan_config(sdlora.load_config(None, given(base, images, Path("x.safetensors"), *more)))


@pytest.mark.parametrize(
    ("epochs", "steps"), [("4", 12), ("2.0", 6), ("0.7", 2), ("0.01", 1), ("33.3", 100), ("33.4", 100)]
)
def test_epochs_are_rounded_to_whole_steps(epochs: str, steps: int, tiny_base: Path, images: Path) -> None:
    plan = planned(tiny_base, images, f"train.epochs={epochs}")
    assert (plan.config.train.steps, plan.config.train.epochs) == (steps, None)
    assert plan.epochs == pytest.approx(steps / 3)


def test_repeats_count_and_validation_images_do_not(tiny_base: Path, tmp_path: Path) -> None:
    """3 images shown 4 times are 12 showings, 6 batches of 2."""
    shown, held = write_images(tmp_path / "a", 3), write_images(tmp_path / "b", 2)
    sets = f'[{{images = "{shown}", repeats = 4}}, {{images = "{held}", role = "validation"}}]'
    settings = [each for each in given(tiny_base, shown, Path("x.safetensors")) if not each.startswith("data.images=")]
    plan = plan_config(sdlora.load_config(None, [*settings, f"data.sets={sets}", "train.epochs=3"]))
    assert (plan.config.train.steps, plan.images) == (18, 3)


def test_a_run_in_epochs_is_the_run_of_as_many_steps(tiny_base: Path, images: Path) -> None:
    identity = planned(tiny_base, images, "train.steps=12").identity
    assert planned(tiny_base, images, "train.epochs=4").identity == identity
    # As in files and checkpoints that were made before there were epochs.
    earlier = replace(identity, config={key: v for key, v in identity.config.items() if key != "train.epochs"})
    assert identity.differences(earlier) == []
    other = planned(tiny_base, images, "train.epochs=5").identity
    assert other.differences(identity) == ["train.steps was 12, is now 15"]


@pytest.mark.parametrize(
    ("number", "batch", "steps", "passes"),
    # Notebook: 2000 to 4000 showings; OneTrainer: 100 epochs; Civitai's trainer: 10 epochs. All by hand.
    [(5, 2, 1200, 400), (24, 4, 600, 100), (24, 5, 500, 100), (60, 4, 1005, 67), (500, 4, 1250, 10)],
)
def test_a_length_that_is_not_stated_comes_from_the_number_of_images(
    number: int, batch: int, steps: int, passes: int, tiny_base: Path, images: Path
) -> None:
    plan = planned(tiny_base, images, f"train.batch_size={batch}", "train.seed=7")
    sizes = [(64, 64)] * number
    training = replace(
        plan.training,
        items=plan.items[:1] * number,
        shown=plan.training.shown[:1] * number,
        batches=BatchPlan.of(sizes, batch_size=batch, seed=0),
    )
    unstated = sdlora.load_config(None, given(tiny_base, images, Path("x.safetensors"), f"train.batch_size={batch}"))
    assert planned_steps(unstated, training) == steps
    words = length_in_words(Length.of(steps), training, by_images=True)
    assert words.startswith(f"{steps} steps: {number} images × {passes} passes in batches of {batch}, since neither")


def test_repeats_make_fewer_epochs_where_no_length_is_stated(tiny_base: Path, images: Path) -> None:
    """5 images × 8 repeats are 20 batches of 2 an epoch, and 50 epochs show 2000 images."""
    settings = [each for each in given(tiny_base, images, Path("x.safetensors")) if not each.startswith("data.images=")]
    plan = plan_config(sdlora.load_config(None, [*settings, f'data.sets=[{{images = "{images}", repeats = 8}}]']))
    assert (plan.config.train.steps, plan.steps, plan.epochs) == (1000, 1000, 50)
    assert plan.length_in_words.startswith("1000 steps: 5 images × 400 passes in batches of 2, since")


def test_a_run_without_a_stated_length_keeps_that_with_which_it_started(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    """As one of an earlier version does, in which the default was 600 steps whatever the images."""
    output = tmp_path / "x.safetensors"
    unstated = plan_config(sdlora.load_config(None, given(tiny_base, images, output)))
    assert continued(unstated, extend=None).steps == 1200
    earlier = unstated.with_length(600, ())
    RunFolder(output, earlier.identity).save(Checkpoint(step=4, started_at=1.0, tensors={}, shape=None))
    now = continued(unstated, extend=None)
    assert (now.steps, now.length_in_words) == (600, "5 images, 600 steps, 200.0 epochs")
    assert now.identity.differences(earlier.identity) == []
    stated = continued(
        plan_config(sdlora.load_config(None, given(tiny_base, images, output, "train.steps=9"))), extend=None
    )
    assert stated.steps == 9
    assert stated.identity.differences(earlier.identity) == ["train.steps was 600, is now 9"]


def test_training_says_the_length_and_the_file_states_it(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    by_epochs, by_steps = tmp_path / "x.safetensors", tmp_path / "steps" / "x.safetensors"
    said: list[str] = []
    more = ("data.resolution=64", "output.title=x")
    config = sdlora.load_config(None, given(tiny_base, images, by_epochs, *more, "train.epochs=1.7"))
    assert sdlora.train(config, say=said.append).result.steps == 5
    assert "5 images, 5 steps, 1.7 epochs" in said
    metadata = read_metadata(by_epochs)
    assert [metadata[f"ss_{key}"] for key in ("max_train_steps", "steps", "num_epochs", "epoch")] == [
        "5",
        "5",
        "2",
        "2",
    ]
    sdlora.train(sdlora.load_config(None, given(tiny_base, images, by_steps, *more, "train.steps=5")))
    same_but_for_times(by_epochs, by_steps)
    again = sdlora.load_config(None, given(tiny_base, images, by_epochs, *more, "train.steps=5"))
    assert sdlora.train(again).result.loss is None


def test_a_plan_says_what_epochs_come_to(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    arguments = ["plan", *given(tiny_base, images, tmp_path / "x.safetensors", "train.epochs=4"), "--no-probe"]
    assert CliRunner().invoke(app, arguments).stdout.splitlines()[0] == "5 images, 12 steps, 4.0 epochs"
    answer = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (answer["steps"], answer["epochs"]) == (12, 4.0)


def test_steps_and_epochs_exclude_each_other(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[train]\nsteps = 300\nepochs = 2.5\n", encoding="utf-8")
    sentence = "train.epochs = 2.5: train.steps = 300 is given too; give one of them"
    with pytest.raises(ConfigError) as caught:
        sdlora.load_config(file, NEEDED)
    assert list(caught.value.problems) == [f"{file}:3: {sentence}"]
    result = CliRunner().invoke(app, ["train", *NEEDED, "--steps", "300", "--epochs", "2.5"])
    assert (result.exit_code, sentence in result.output) == (1, True)


@pytest.mark.parametrize(
    ("value", "expected"), [("0", "more than 0"), ("nan", "a finite number"), ("inf", "a finite number")]
)
def test_a_length_that_is_none_is_refused(value: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.epochs = {value}: must be {expected}"):
        sdlora.load_config(None, (*NEEDED, f"train.epochs={value}"))
