"""Too little memory at any phase of a run: a sentence that says what to change, or with ``train.fit`` a finished run.

The shortage is injected: a function raises what torch raises, at the call that a test names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sdlora as package
from sdlora.errors import DeviceMemoryError
from sdlora.training import checkpoint, exports, latents, loop
from sdlora.training.session import TrainingSession
from sdlora.training.step_shape import StepShape
from tests.training_runs import STEPS, config_for, same_but_for_times

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
FROZEN = "optimizer.text_encoder_learning_rate=0"


def fail_at(
    patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], error: type = torch.OutOfMemoryError
) -> None:
    """``owner.name`` runs out of memory where ``when``, called with its arguments, is true."""
    original = getattr(owner, name)

    def failing(*given: Any, **named: Any) -> Any:
        if when(*given, **named):
            raise error(FULL)
        return original(*given, **named)

    patch.setattr(owner, name, failing)


def sentence(base: Path, images: Path, out: Path, *more: str) -> str:
    with pytest.raises(DeviceMemoryError) as caught:
        package.train(config_for(base, images, out, "cache.disk=false", *more))
    text = str(caught.value)
    assert text.startswith("out of memory ")
    assert "\n" not in text
    assert FULL not in text
    return text


@pytest.mark.parametrize(("owner", "name", "said"), [
    (loop, "load_base", "loading the base; close other programs"),
    (latents, "encode_pixels", "encoding images; lower data.resolution"),
    ("sdlora.training.session", "GuardedAdamW", "placing the UNet and the LoRA; lower lora.rank"),
    (loop, "validation_loss", "measuring losses after the last step; close other programs"),
    (exports, "write_lora", "writing "),
])  # fmt: skip
def test_each_phase_has_its_sentence_and_the_same_command_goes_on(
    owner: Any, name: str, said: str, finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    images, whole = finished
    if isinstance(owner, str):
        from sdlora.training import session as owner
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, owner, name, lambda *_, **__: True)
        text = sentence(tiny_base, images, tmp_path / "x.safetensors")
    assert said in text
    if name == "write_lora":
        assert f"step-{STEPS:08}.safetensors" in text
    assert not (tmp_path / "x.safetensors").exists()
    assert not list(tmp_path.rglob("*.partial*"))
    package.train(config_for(tiny_base, images, tmp_path / "x.safetensors"))
    same_but_for_times(whole, tmp_path / "x.safetensors")


@pytest.mark.parametrize("failing", [0, 9])
def test_a_step_that_does_not_fit_says_which_setting_to_change(
    failing: int, finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    images, whole = finished
    output = tmp_path / "x.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, TrainingSession, "step", lambda _, step: step == failing)
        text = sentence(tiny_base, images, output, "train.save_every=100")
    assert f"step {failing + 1} with 2 images at once, without gradient checkpointing" in text
    assert "set train.micro_batch=1" in text
    assert "train.gradient_checkpointing=true" in text
    assert "train.fit=true" in text
    # The state before the step is kept, however rarely checkpoints are written.
    result = package.train(config_for(tiny_base, images, output, "train.save_every=100")).result
    assert result.resumed_from == failing
    same_but_for_times(whole, output)


def test_with_nothing_left_to_halve_the_sentence_names_other_settings(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, TrainingSession, "step", lambda *_: True, RuntimeError)
    text = sentence(tiny_base, images, tmp_path / "x.safetensors", "train.fit=true")
    assert "step 1 with one image at once, with gradient checkpointing" in text
    assert "micro_batch" not in text
    assert "optimizer.text_encoder_learning_rate=0" in text
    assert "start over (--restart) with a lower data.resolution or lora.rank" in text
    assert 'base.quantization="nf4"' in text


def test_other_faults_are_not_taken_for_a_shortage(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr(TrainingSession, "step", broken)
    with pytest.raises(RuntimeError, match="scalar type"):
        package.train(config_for(tiny_base, images, tmp_path / "x.safetensors", "train.fit=true"))


def test_shapes_get_smaller_and_end() -> None:
    shape, shapes = StepShape(micro_batch=5, checkpointing=False), []
    while shape := shape.smaller():
        shapes.append((shape.micro_batch, shape.checkpointing))
    assert shapes == [(2, False), (1, False), (1, True)]
    shape = StepShape(micro_batch=3, checkpointing=True)
    assert StepShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize("failing", [0, 9])
def test_with_fit_the_run_ends_with_the_same_draws(
    failing: int,
    finished: tuple[Path, Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Memory runs out in the middle of a backward pass, when some gradients are there already."""
    images, whole = finished
    backward, calls = torch.Tensor.backward, []

    def half_way(loss: torch.Tensor, *given: Any, **named: Any) -> None:
        backward(loss, *given, **named)
        calls.append(1)
        if len(calls) == failing + 1:
            raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(torch.Tensor, "backward", half_way)
    output = tmp_path / "x.safetensors"
    package.train(config_for(tiny_base, images, output, "train.fit=true", "cache.disk=false"))
    assert f"step {failing + 1}: out of memory with 2 images at once" in caplog.text
    assert len(calls) > STEPS
    monkeypatch.undo()
    close_to(whole, output)
    if not failing:
        small = tmp_path / "small" / "x.safetensors"
        package.train(config_for(tiny_base, images, small, "train.micro_batch=1", "cache.disk=false"))
        same_but_for_times(small, output)


def close_to(one: Path, other: Path) -> None:
    """The same up to rounding: another micro-batch adds in another order."""
    from safetensors.torch import load_file

    tensors = [load_file(file) for file in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=0.05, atol=2e-3)


def test_a_resumed_run_takes_the_shape_that_was_found(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, StepShape]] = []
    step_of = TrainingSession.step

    def step(session: TrainingSession, step: int) -> torch.Tensor:
        used.append((step, session.shape))
        if step == 3 and session.shape.micro_batch > 1:
            raise torch.OutOfMemoryError(FULL)
        if step == 5 and len(used) < 8:
            raise KeyError
        return step_of(session, step)

    monkeypatch.setattr(TrainingSession, "step", step)
    output = tmp_path / "x.safetensors"
    more = ("train.fit=true", "cache.disk=false", "train.save_every=1", "train.steps=7")
    with pytest.raises(KeyError):
        package.train(config_for(tiny_base, images, output, *more))
    first, last = StepShape(micro_batch=2, checkpointing=False), StepShape(micro_batch=1, checkpointing=False)
    assert used == [(0, first), (1, first), (2, first), (3, first), (3, last), (4, last), (5, last)]
    package.train(config_for(tiny_base, images, output, *more))
    assert used[7:] == [(5, last), (6, last)]


def test_a_checkpoint_for_which_memory_is_short_is_a_warning(
    finished: tuple[Path, Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    images, whole = finished
    fail_at(monkeypatch, checkpoint, "serialise", lambda *_: True)
    package.train(config_for(tiny_base, images, tmp_path / "x.safetensors"))
    assert "step 2 cannot be saved (out of memory); kept: no checkpoint" in caplog.text
    same_but_for_times(whole, tmp_path / "x.safetensors")
