"""Training in float16 and bfloat16 against float32, and the loss scale against its rules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import sdlora as package
from sdlora.base.load import load_base
from sdlora.config.sections import OptimizerSection
from sdlora.errors import TrainingError
from sdlora.formats.safetensors_file import read_header
from sdlora.progress import Silence
from sdlora.training import steps
from sdlora.training.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.plan import plan_config
from sdlora.training.session import TrainingSession, open_session
from tests.conftest import write_images
from tests.training_runs import config_for, same_but_for_times

SECTION = OptimizerSection(warmup_steps=0, schedule="constant", max_grad_norm=0.5)
CPU = torch.device("cpu")


def optimizer(values: torch.Tensor, *, dtype: torch.dtype = torch.float16) -> tuple[GuardedAdamW, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(values.clone())
    return GuardedAdamW([parameter], [1e-2], SECTION, steps=100_000, dtype=dtype), parameter


def scale_of(guarded: GuardedAdamW) -> float:
    return guarded.scaled(torch.ones(())).item()


def test_the_loss_scale_is_divided_out_before_clipping() -> None:
    start = torch.randn(50)
    (plain, expected), (scaled, parameter) = optimizer(start, dtype=torch.float32), optimizer(start)
    assert scale_of(plain) == 1
    for step in range(5):
        gradient = torch.randn(50) * (10.0 if step % 2 else 1e-3)
        expected.grad = gradient.clone()
        parameter.grad = gradient * scale_of(scaled)
        plain.step(step)
        scaled.step(step)
    assert torch.equal(parameter, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_norm_of_zero_does_not_clip(dtype: torch.dtype) -> None:
    """As in kohya's trainer; plain gradient descent shows the gradients' size, to which Adam is blind."""
    section = SECTION.model_copy(update={"name": "sgd", "max_grad_norm": 0.0})
    start, gradient = torch.randn(50), 100 * torch.randn(50)
    parameter = torch.nn.Parameter(start.clone())
    guarded = GuardedAdamW([parameter], [1e-2], section, steps=9, dtype=dtype)
    parameter.grad = gradient * scale_of(guarded)
    guarded.step(0)
    torch.testing.assert_close(parameter.detach(), start - 1e-2 * gradient)
    parameter.grad = torch.full((50,), torch.inf)
    guarded.step(1)
    torch.testing.assert_close(parameter.detach(), start - 1e-2 * gradient)
    assert guarded.skipped_steps() == 1


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(broken: float) -> None:
    guarded, parameter = optimizer(torch.randn(50))
    parameter.grad = torch.randn(50)
    guarded.step(0)
    before = {name: tensor.clone() for name, tensor in guarded.state().items()}
    parameter.grad = torch.randn(50)
    parameter.grad[7] = broken
    guarded.step(1)
    after = guarded.state()
    assert scale_of(guarded) == INITIAL_SCALE / 2
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"skipped", "loss_scale", "loss_scale.good", "loss_scale.drops"}
    assert (guarded.skipped_steps(), guarded.settling_steps()) == (1, 1)


def test_the_scale_doubles_after_enough_good_steps_in_a_row() -> None:
    guarded, parameter = optimizer(torch.randn(3))
    reference = torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL)
    reference.scale(torch.ones(()))
    for step in range(2 * GROWTH_INTERVAL + 10):
        broken = step in (0, 7, GROWTH_INTERVAL + 9)
        parameter.grad = torch.full((3,), torch.inf if broken else 1.0)
        guarded.step(step)
        assert reference._scale is not None
        assert reference._growth_tracker is not None
        torch._amp_update_scale_(
            reference._scale, reference._growth_tracker, torch.tensor(float(broken)), 2.0, 0.5, GROWTH_INTERVAL
        )
        if step % 500 < 10:
            assert scale_of(guarded) == reference.get_scale()
    assert scale_of(guarded) == INITIAL_SCALE / 2


def test_steps_count_as_skipped_once_the_scale_cannot_fall() -> None:
    guarded, parameter = optimizer(torch.randn(3))
    for step in range(20):
        parameter.grad = torch.full((3,), torch.nan)
        guarded.step(step)
    assert scale_of(guarded) == 1
    assert guarded.skipped_steps() - guarded.settling_steps() == 4


def test_restoring_is_exact_and_neutral_without_a_scale() -> None:
    guarded, parameter = optimizer(torch.randn(3))
    for step, value in enumerate((1.0, torch.inf, 2.0)):
        parameter.grad = torch.full((3,), value)
        guarded.step(step)
    saved = {name: tensor.clone() for name, tensor in guarded.state().items()}
    again, _ = optimizer(torch.zeros(3))
    again.restore(saved)
    assert again.state().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.state().items())
    plain, _ = optimizer(torch.zeros(3), dtype=torch.float32)
    plain.restore(saved)
    without = plain.state()
    assert without.keys() == {name for name in saved if not name.startswith("loss_scale")}
    neutral, _ = optimizer(torch.zeros(3))
    neutral.restore(without)
    assert scale_of(neutral) == INITIAL_SCALE


def trained(base: str | Path, images: Path, dtype: torch.dtype, steps: int, *more: str) -> tuple[torch.Tensor, ...]:
    """Loss of each step, and the weights after the last, flat."""
    config = config_for(Path(base), images, Path("x.safetensors"), f"train.steps={steps}", *more)
    plan = plan_config(config)
    session = open_session(plan, load_base(plan.base, device=CPU, dtype=dtype), Accelerator(), Silence())
    with session.attached():
        losses = torch.stack([session.step(step) for step in range(steps)])
    assert session.optimizer.skipped_steps() == 0
    return losses, torch.cat([parameter.detach() for parameter in session.adapter.parameters])


BOUNDS = [(torch.float16, 1e-3, 5e-3), (torch.bfloat16, 1e-2, 5e-2)]
"""dtype, largest relative difference of a loss from float32's, and of all weights together."""


def compared(base: str | Path, images: Path, dtype: torch.dtype, loss: float, weights: float, *more: str) -> None:
    losses, values = trained(base, images, dtype, 50, *more)
    expected_losses, expected = trained(base, images, torch.float32, 50, *more)
    assert ((losses - expected_losses).abs() / expected_losses).max().item() < loss
    assert ((values - expected).norm() / expected.norm()).item() < weights


@pytest.mark.parametrize(("dtype", "loss", "weights"), BOUNDS)
def test_fifty_steps_follow_float32(
    tiny_base: Path, images: Path, dtype: torch.dtype, loss: float, weights: float
) -> None:
    compared(tiny_base, images, dtype, loss, weights, "optimizer.learning_rate=1e-3")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "loss", "weights"), [(torch.float16, 5e-3, 5e-3), (torch.bfloat16, 5e-2, 5e-2)])
def test_fifty_steps_on_mini_follow_float32(dtype: torch.dtype, loss: float, weights: float) -> None:
    more = ("optimizer.learning_rate=3e-4", "optimizer.text_encoder_learning_rate=5e-5", "train.batch_size=1")
    compared("mini", Path("datasets/blueprint"), dtype, loss, weights, *more)


def test_small_gradients_survive_by_the_scale_alone(
    tiny_base: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss weighted with 1e-4 has gradients that float16 rounds to zero or nearly so; Adam's step is the same."""
    more = ("objective.min_snr_gamma=1e-4", "optimizer.learning_rate=1e-3")
    _, expected = trained(tiny_base, images, torch.float32, 5, *more)
    _, scaled = trained(tiny_base, images, torch.float16, 5, *more)
    monkeypatch.setattr(GuardedAdamW, "scaled", lambda self, loss: loss)
    _, unscaled = trained(tiny_base, images, torch.float16, 5, *more)
    assert (scaled - expected).norm() < 0.1 * (unscaled - expected).norm()


class Stopped(Exception):
    pass


def test_a_resumed_run_in_float16_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny import write_tiny_base

    base, images = write_tiny_base(tmp_path / "base"), write_images(tmp_path / "images")
    more = ("train.precision=float16", "train.save_every=1")
    whole, parts = (tmp_path / name / "x.safetensors" for name in ("whole", "parts"))
    take_step = TrainingSession.step

    def overflowing(self: TrainingSession, number: int) -> torch.Tensor:
        """Two of the gradients overflow, as at the start of many runs."""
        scaled = self.optimizer.scaled
        self.optimizer.scaled = (lambda loss: scaled(loss) * torch.inf) if number in (0, 5) else scaled  # type: ignore[method-assign]
        loss = take_step(self, number)
        self.optimizer.scaled = scaled  # type: ignore[method-assign]
        return loss

    def stopping(self: TrainingSession, number: int) -> torch.Tensor:
        if number == 7:
            raise Stopped
        return overflowing(self, number)

    monkeypatch.setattr(TrainingSession, "step", overflowing)
    package.train(config_for(base, images, whole, *more))
    monkeypatch.setattr(TrainingSession, "step", stopping)
    with pytest.raises(Stopped):
        package.train(config_for(base, images, parts, *more))
    monkeypatch.setattr(TrainingSession, "step", overflowing)
    assert package.train(config_for(base, images, parts, *more)).result.resumed_from == 7
    same_but_for_times(whole, parts)
    assert read_header(parts, TrainingError).metadata["ss_mixed_precision"] == "fp16"


@pytest.mark.parametrize(("overflows", "fails"), [(5, False), (12, True)])
def test_a_settling_scale_ends_no_run_but_a_broken_model_does(
    overflows: int, fails: bool, tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 of 12 steps overflow at the start, among them all before the first three checks; or all 12."""
    assert steps.MAX_SKIPPED_SHARE == 0.5
    take_step = GuardedAdamW.step

    def step(self: GuardedAdamW, number: int, *more: Accelerator) -> None:
        if number < overflows:
            for parameter in self._parameters:
                assert parameter.grad is not None
                parameter.grad[0] = torch.inf
        take_step(self, number, *more)

    monkeypatch.setattr(GuardedAdamW, "step", step)
    config = config_for(tiny_base, images, tmp_path / "x.safetensors", "train.precision=float16")
    if fails:
        with pytest.raises(TrainingError, match="12 of 12 steps"):
            package.train(config)
    else:
        assert package.train(config).result.loss is not None
