"""Until which step the text encoder is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sdlora
from sdlora.config.loading import load_config
from sdlora.config.sections import OptimizerSection
from sdlora.errors import ConfigError, Interrupted
from sdlora.lora.change import Change
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.plan import plan_config
from sdlora.training.rates import steps_of
from tests.conftest import write_images
from tests.training_runs import config_for, same_but_for_times, session_for

STOP = "optimizer.text_encoder_stop=3"


def changed(before: dict[str, Change], after: dict[str, Change]) -> set[str]:
    """Parts of which a module has changed."""
    return {
        name.partition(".")[0]
        for name, change in after.items()
        if any(not torch.equal(tensor, before[name].tensors()[key]) for key, tensor in change.tensors().items())
    }


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoders_stay_as_they_are_after_the_stop(
    family: str, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    images = write_images(tmp_path / "images", 2)
    session = session_for(tiny_files[family], images, tmp_path / "x.safetensors", STOP, "data.resolution=64")
    encoders = {"text_encoder"} if family == "sd1" else {"text_encoder", "text_encoder_2"}
    with session.attached():
        for step in range(5):
            before = session.adapter.changes()
            session.step(step)
            assert changed(before, session.adapter.changes()) == {"unet"} | (encoders if step < 3 else set())


def test_gradients_after_the_stop_neither_count_nor_leave_a_trace() -> None:
    """The other parameter moves as it does alone; the stopped one keeps its values and moments."""
    section = OptimizerSection(warmup_steps=0, schedule="constant", max_grad_norm=0.5)
    start = torch.linspace(-1, 1, 8)
    ours, stopped, alone = (torch.nn.Parameter(start.clone()) for _ in range(3))
    both = GuardedAdamW([ours, stopped], [1e-2, 1e-2], section, steps=9, lengths=[9, 0])
    single = GuardedAdamW([alone], [1e-2], section, steps=9)
    for step in range(9):
        ours.grad = torch.full((8,), step - 3.0)
        alone.grad = ours.grad.clone()
        stopped.grad = torch.full((8,), torch.nan if step == 4 else 100.0)
        both.step(step)
        single.step(step)
    assert torch.equal(ours, alone)
    state = both.state()
    assert torch.equal(state["parameter.1"], start)
    assert not state["exp_avg.1"].any()
    assert both.skipped_steps() == 0


@pytest.mark.parametrize(("stated", "expected"), [(None, 90), (7, 7), (400, 90), (0.25, 22)])
def test_the_stop_is_a_number_or_a_share_of_the_steps(stated: float | None, expected: int) -> None:
    section = OptimizerSection(text_encoder_stop=stated)
    assert steps_of("text_encoder", section, steps=90) == expected
    assert steps_of("unet", section, steps=90) == 90


def test_a_run_stopped_after_it_resumes_to_the_same_bytes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, outputs = write_images(tmp_path / "images", 3), [tmp_path / name / "x.safetensors" for name in "ab"]
    more = ("optimizer.text_encoder_stop=0.5", "train.steps=4", "data.resolution=64", "data.caption_dropout=0.2")
    sdlora.train(config_for(tiny_base, images, outputs[0], *more))
    step = GuardedAdamW.step

    def interrupted(self: GuardedAdamW, number: int, *more: object) -> None:
        if number == 3:
            raise Interrupted("as if killed")
        step(self, number, *more)  # ty: ignore[invalid-argument-type]

    config = config_for(tiny_base, images, outputs[1], *more)
    with monkeypatch.context() as patch:
        patch.setattr(GuardedAdamW, "step", interrupted)
        with pytest.raises(Interrupted):
            sdlora.train(config)
    assert sdlora.train(config).result.resumed_from == 2
    same_but_for_times(*outputs)


def test_a_run_that_would_train_nothing_more_is_refused(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    config = config_for(tiny_base, images, tmp_path / "x.safetensors", STOP, "optimizer.learning_rate=0")
    with pytest.raises(ConfigError, match=r"text_encoder_stop = 3: optimizer\.learning_rate is 0, so nothing would be"):
        plan_config(config)
    targets = 'lora.targets=["text_encoder.*"]'
    config = config_for(tiny_base, images, tmp_path / "x.safetensors", STOP, targets)
    with pytest.raises(ConfigError, match=r"text_encoder_stop = 3: no module of the UNet is trained, so nothing would"):
        plan_config(config)
    needed = ("data.images=images", "data.trigger=zorb", "output.path=x.safetensors")
    with pytest.raises(ConfigError, match=r"optimizer\.text_encoder_stop = 0: must be a whole number of steps"):
        load_config(None, (*needed, "optimizer.text_encoder_stop=0"))
