"""LoRA files on the way: the weights of their step, true metadata, only as many as are kept, and no file of others lost."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import sdlora as package
from sdlora.errors import ResumeError
from sdlora.formats.lora_file import read_lora
from sdlora.formats.safetensors_file import read_header
from sdlora.training.session import TrainingSession
from tests.training_runs import config_for, same_but_for_times

CONSTANT = ("optimizer.schedule=constant", "optimizer.warmup_steps=0", "data.caption_dropout=0.1")


def payload(file: Path) -> bytes:
    return file.read_bytes()[read_header(file, ResumeError).payload_start :]


def steps_in(folder: Path) -> list[str]:
    return sorted(file.name.removeprefix("x-") for file in folder.iterdir() if file.name.startswith("x-"))


def stopped_after(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """The step after ``last`` fails as if the process were killed."""
    step = TrainingSession.step

    def failing(self: TrainingSession, number: int) -> object:
        if number == last:
            raise InterruptedError
        return step(self, number)

    monkeypatch.setattr(TrainingSession, "step", failing)


def test_a_file_on_the_way_is_that_of_a_run_of_so_many_steps(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    images, short = finished[0], tmp_path / "short.safetensors"
    output = tmp_path / "x.safetensors"
    package.train(config_for(tiny_base, images, output, *CONSTANT, "output.save_every=5"))
    package.train(config_for(tiny_base, images, short, *CONSTANT, "train.steps=5"))
    assert steps_in(tmp_path) == ["000005.safetensors", "000010.safetensors"]
    on_the_way = [tmp_path / f"x-{name}" for name in steps_in(tmp_path)]
    assert payload(on_the_way[0]) == payload(short)
    assert len({payload(file) for file in (*on_the_way, output)}) == 3
    tables = [read_header(file, ResumeError).metadata for file in (*on_the_way, output)]
    assert [table["ss_steps"] for table in tables] == ["5", "10", "12"]
    epochs = [-(-step // int(tables[0]["ss_num_batches_per_epoch"])) for step in (5, 10, 12)]
    assert [int(table["ss_epoch"]) for table in tables] == epochs
    assert len({table["ss_num_epochs"] for table in tables} | {str(epochs[-1])}) == 1
    assert {table["ss_max_train_steps"] for table in tables} == {"12"}
    assert ["sdlora_run" in table for table in tables] == [False, False, True]
    assert len({table["sshs_model_hash"] for table in tables}) == 3
    assert len(read_lora(on_the_way[0]).modules) == len(read_lora(output).modules)


@pytest.mark.parametrize("level", ["full", "none"])
def test_the_newest_are_kept_and_a_resumed_run_knows_its_own(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """Resumed from step 6, after the file of step 9 was written; the file of step 3 and that of another stay."""
    output, others = tmp_path / "x.safetensors", tmp_path / "x-000002.safetensors"
    others.write_bytes(b"of someone else")
    settings = ("output.save_every=3", "train.save_every=6", f"output.metadata={level}")
    with monkeypatch.context() as patch:
        stopped_after(patch, 10)
        with pytest.raises(InterruptedError):
            package.train(config_for(tiny_base, finished[0], output, *settings))
    suffixes = ["run.json", "safetensors"] if level == "none" else ["safetensors"]
    assert steps_in(tmp_path) == ["000002.safetensors", *(f"00000{n}.{s}" for n in (3, 6, 9) for s in suffixes)]
    before = payload(tmp_path / "x-000009.safetensors")
    result = package.train(config_for(tiny_base, finished[0], output, *settings, "output.keep=1")).result
    assert result.resumed_from == 6
    assert payload(tmp_path / "x-000009.safetensors") == before
    assert steps_in(tmp_path) == ["000002.safetensors", *(f"000009.{s}" for s in suffixes)]
    assert others.read_bytes() == b"of someone else"
    assert payload(output) == payload(finished[1])
    assert [file.name for file in (tmp_path / "x.resume").iterdir()] == ["last.safetensors"]


def test_what_others_wrote_is_never_replaced_and_restart_replaces_its_own(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output, taken = tmp_path / "x.safetensors", tmp_path / "x-000004.safetensors"
    taken.write_bytes(finished[1].read_bytes())
    settings = ("output.save_every=4",)
    for restart in (False, True):
        with pytest.raises(ResumeError, match=r"x-000004\.safetensors: exists, .*output\.save_every = 4 would replace"):
            package.train(config_for(tiny_base, finished[0], output, *settings), restart=restart)
    assert payload(taken) == payload(finished[1])
    taken.unlink()
    package.train(config_for(tiny_base, finished[0], output, *settings))
    first = payload(taken)
    output.unlink()
    changed = config_for(tiny_base, finished[0], output, "train.seed=3", *settings)
    with pytest.raises(ResumeError, match=r"x-000004.*--restart"):
        package.train(changed)
    assert payload(taken) == first
    package.train(config_for(tiny_base, finished[0], output, "train.seed=3", "output.save_every=8"), restart=True)
    assert steps_in(tmp_path) == ["000008.safetensors"]


def test_one_that_does_not_fit_is_a_warning(
    finished: tuple[Path, Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sdlora.training import exports

    output, write = tmp_path / "x.safetensors", exports.write_lora

    def full(path: Path, *rest: object, **more: object) -> None:
        if path != output:
            raise OSError(28, "No space left on device", str(path))
        write(path, *rest, **more)

    monkeypatch.setattr(exports, "write_lora", full)
    with caplog.at_level(logging.WARNING):
        package.train(config_for(tiny_base, finished[0], output, "output.save_every=5"))
    assert [line for line in caplog.messages if "cannot be written (No space left on device)" in line] == [
        f"{tmp_path / f'x-{step:06}.safetensors'} cannot be written (No space left on device); the run goes on without it"
        for step in (5, 10)
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.resume", "x.safetensors"]
    same_but_for_times(output, finished[1])


def test_nothing_of_the_way_decides_resuming(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    output.write_bytes(finished[1].read_bytes())
    settings = ("output.save_every=3", "output.keep=2")
    assert package.train(config_for(tiny_base, finished[0], output, *settings)).result.loss is None
    assert (
        json.loads(read_header(output, ResumeError).metadata["sdlora_run"])["config"]
        .keys()
        .isdisjoint({"output.save_every", "output.keep"})
    )
