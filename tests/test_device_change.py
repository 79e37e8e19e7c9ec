"""A half-done run on another device or in another precision, and the algorithms of a deterministic run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdlora as package
from sdlora.base.checkpoint import find_base
from sdlora.errors import ConfigError, ResumeError
from sdlora.formats.safetensors_file import read_header
from sdlora.training import determinism
from sdlora.training.checkpoint import RUN_KEY, RunIdentity
from sdlora.training.checkpoint import finished as is_finished
from sdlora.training.determinism import deterministic_algorithms
from sdlora.training.session import TrainingSession
from tests.conftest import run_sdlora
from tests.training_runs import STEPS, config_for, overrides, same_but_for_times


class Stopped(Exception):
    pass


@pytest.fixture
def half_done(tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Leaves a run with the given settings after step 4; returns its output."""

    def leave(*more: str) -> Path:
        take_step = TrainingSession.step

        def step(self: TrainingSession, number: int) -> torch.Tensor:
            if number == 4:
                raise Stopped
            return take_step(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingSession, "step", step)
            with pytest.raises(Stopped):
                package.train(config_for(tiny_base, images, tmp_path / "x.safetensors", *more))
        return tmp_path / "x.safetensors"

    return leave


def rewrite_identities(output: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the identity in every checkpoint of a half-done run."""
    for file in output.with_suffix(".resume").glob("*.safetensors"):
        header = read_header(file, ResumeError)
        identity = json.loads(header.metadata["identity"])
        change(identity)
        save_file(load_file(file), file, metadata={**header.metadata, "identity": json.dumps(identity)})


def test_another_device_is_refused_or_accepted(
    half_done: Callable[..., Path], tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    output = half_done()
    rewrite_identities(output, lambda identity: identity.update(device="cuda", precision="bfloat16"))
    expected = r"the device was cuda, is now cpu; the precision was bfloat16, is now float32; .*--allow-device-change"
    with pytest.raises(ResumeError, match=expected):
        package.train(config_for(tiny_base, images, output))
    result = run_sdlora("train", *overrides(tiny_base, images, output), cwd=tmp_path)
    assert result.returncode == 1
    assert "--allow-device-change" in result.stderr
    result = run_sdlora("train", *overrides(tiny_base, images, output), "--allow-device-change", "--json", cwd=tmp_path)
    assert json.loads(result.stdout)["resumed_from"] == 4
    made = json.loads(read_header(output, ResumeError).metadata[RUN_KEY])
    assert (made["device"], made["precision"]) == ("cpu", "float32")


@pytest.mark.parametrize("order", [("float32", "float16"), ("float16", "bfloat16")])
def test_another_set_precision_is_refused_or_accepted(
    order: tuple[str, str], half_done: Callable[..., Path], tiny_base: Path, images: Path
) -> None:
    before, now = (f"train.precision={each}" for each in order)
    output = half_done(before)
    expected = rf'train\.precision was "{order[0]}", is now "{order[1]}".*--allow-device-change'
    with pytest.raises(ResumeError, match=expected):
        package.train(config_for(tiny_base, images, output, now))
    with pytest.raises(ResumeError, match=r"train\.seed") as refused:
        package.train(config_for(tiny_base, images, output, now, "train.seed=1"))
    assert "--allow-device-change" not in str(refused.value)
    with pytest.raises(ResumeError, match=r"train\.seed"):
        package.train(config_for(tiny_base, images, output, now, "train.seed=1"), allow_device_change=True)
    report = package.train(config_for(tiny_base, images, output, now), allow_device_change=True)
    assert report.result.resumed_from == 4


def test_a_run_of_an_earlier_version_resumes_as_before(
    half_done: Callable[..., Path], finished: tuple[Path, Path], tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    def as_earlier(identity: dict[str, object]) -> None:
        del identity["device"], identity["precision"]

    whole = tmp_path / "whole" / "x.safetensors"
    package.train(config_for(tiny_base, images, whole))
    output = half_done()
    rewrite_identities(output, as_earlier)
    assert package.train(config_for(tiny_base, images, output)).result.resumed_from == 4
    same_but_for_times(whole, output)


def test_a_finished_run_is_finished_on_every_device(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    config = config_for(tiny_base, images, output)
    identity = RunIdentity.of(config, dataset="d", base=find_base(config.base))
    save_file({"x": torch.zeros(1)}, output, metadata={RUN_KEY: identity.on("cuda", torch.float16).to_json()})
    assert is_finished(output, identity.on("cpu", torch.float32))
    assert RunIdentity.from_json(identity.on("mps", torch.float16).to_json()) == identity.on("mps", torch.float16)


def test_a_deterministic_run_uses_deterministic_algorithms_and_then_restores(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, ...]] = []
    take_step = TrainingSession.step

    def step(self: TrainingSession, number: int) -> torch.Tensor:
        seen.append(deterministic_state())
        return take_step(self, number)

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(TrainingSession, "step", step)
    before = deterministic_state()
    plain, exact = tmp_path / "plain" / "x.safetensors", tmp_path / "exact" / "x.safetensors"
    more = ("samples.prompts=['a fox']", "output.thumbnail=false")
    package.train(config_for(tiny_base, images, plain, *more))
    assert set(seen) == {before}
    seen.clear()
    package.train(config_for(tiny_base, images, exact, "train.deterministic=true", *more))
    assert set(seen) == {(True, False, False, False, ":4096:8")}
    assert len(seen) == STEPS
    assert deterministic_state() == before
    same_but_for_times(plain, exact)


def deterministic_state() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def test_what_the_environment_sets_stays_and_errors_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = deterministic_state()
    with suppress(Stopped), deterministic_algorithms(True):
        assert deterministic_state()[0] is True
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        raise Stopped
    assert deterministic_state() == before


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("it uses CuBLAS ... you must set CUBLAS_WORKSPACE_CONFIG=:4096:8 ...", ConfigError),
        ("CUDA error: an illegal memory access was encountered", RuntimeError),
    ],
)
def test_a_gpu_that_has_multiplied_otherwise_before_is_one_line(
    message: str, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``sdlora.generate`` in the same notebook: torch reads the variable at the first product of the process."""

    def multiply() -> None:
        raise RuntimeError(message)

    before = deterministic_state()
    monkeypatch.setattr(determinism, "_multiply", multiply)
    with deterministic_algorithms(True):
        assert not torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(expected, match="fixed workspace" if expected is ConfigError else message):  # noqa: SIM117
        with deterministic_algorithms(True):
            raise AssertionError("went on")
    assert deterministic_state() == before


def test_deterministic_algorithms_do_not_go_with_xformers(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r'train\.deterministic = true is not possible with base\.attention = "xformers"'
    ):
        config_for(tiny_base, images, tmp_path / "x.safetensors", "train.deterministic=true", "base.attention=xformers")
