"""AdamW in plain operators, as on Apple's GPUs, against torch's fused kernel; and what such a GPU cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sdlora.base.load import load_base
from sdlora.config.loading import load_config
from sdlora.config.sections import OptimizerSection
from sdlora.errors import ConfigError
from sdlora.progress import Silence
from sdlora.training import optimizer
from sdlora.training.metadata import training_metadata
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.optimizers import adamw
from sdlora.training.optimizers.adamw import FusedAdamW, SelectedAdamW
from sdlora.training.plan import plan_config
from sdlora.training.session import open_session
from tests.test_formats import facts
from tests.training_runs import config_for

SECTION = OptimizerSection(warmup_steps=5, weight_decay=0.01)


def guarded(
    kind: type[FusedAdamW | SelectedAdamW], start: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[GuardedAdamW, list[torch.nn.Parameter]]:
    monkeypatch.setattr(optimizer, "adamw", kind)
    parameters = [torch.nn.Parameter(values.clone()) for values in start]
    return GuardedAdamW(parameters, [1e-3, 1e-4], SECTION, steps=100), parameters


def test_plain_operators_equal_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    start = [torch.rand(1000) - 0.5, torch.rand(300) - 0.5]
    (fused, expected), (plain, parameters) = (guarded(kind, start, monkeypatch) for kind in (FusedAdamW, SelectedAdamW))
    for step in range(100):
        for one, other in zip(expected, parameters, strict=True):
            one.grad = torch.randn_like(one) * 10.0 ** (step % 7 - 5)
            if step in (0, 3, 50):
                one.grad[step] = torch.nan if step == 3 else torch.inf
            other.grad = one.grad.clone()
        fused.step(step)
        plain.step(step)
        for name, tensor in fused.state().items():
            torch.testing.assert_close(plain.state()[name], tensor, rtol=0, atol=1e-7, msg=f"{name} after step {step}")
    assert plain.skipped_steps() == fused.skipped_steps() == 3
    assert plain.state().keys() == fused.state().keys()


def test_a_broken_step_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, parameters = guarded(SelectedAdamW, [torch.randn(50), torch.randn(5)], monkeypatch)
    for broken in (1.0, torch.nan, -torch.inf):
        before = {name: tensor.clone() for name, tensor in plain.state().items()}
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
            parameter.grad[2] = broken
        plain.step(7)
        if broken != 1.0:
            changed = {name for name, tensor in plain.state().items() if not torch.equal(tensor, before[name])}
            assert changed == {"skipped"}


def test_a_step_that_runs_out_of_memory_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the step that ``train.fit`` does again would move some of the parameters twice."""
    plain, parameters = guarded(SelectedAdamW, [torch.randn(50), torch.randn(5)], monkeypatch)
    before = {name: tensor.clone() for name, tensor in plain.state().items()}
    where, calls = torch.where, list[None]()

    def short_of_memory(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) > 8:
            raise torch.OutOfMemoryError
        return where(*arguments)

    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "where", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            plain.step(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state().items())


def test_a_checkpoint_of_one_is_resumed_by_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    start = [torch.randn(50), torch.randn(5)]
    fused, expected = guarded(FusedAdamW, start, monkeypatch)
    plain, parameters = guarded(SelectedAdamW, [torch.zeros(50), torch.zeros(5)], monkeypatch)
    for step in range(4):
        if step == 2:
            plain.restore(fused.state())
        for one, other in zip(expected, parameters, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        fused.step(step)
        if step >= 2:
            plain.step(step)
    for one, other in zip(expected, parameters, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", FusedAdamW), ("mps", SelectedAdamW), ("xpu", SelectedAdamW), ("cuda", FusedAdamW)]
)
def test_the_fused_kernel_is_used_where_it_skips(device: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    class On:
        def __init__(self) -> None:
            self.device = torch.device(device)

    made: list[type] = []
    for each in ("FusedAdamW", "SelectedAdamW"):
        original = getattr(adamw, each)
        monkeypatch.setattr(adamw, each, lambda *_, original=original, **more: made.append(original))
    adamw.adamw([On()], SECTION)  # type: ignore[list-item]
    assert made == [kind]


def test_gradients_of_several_processes_are_summed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sum over the flat buffer itself; the sum of two processes with the same gradients is the double."""

    class OfTwo:
        num_processes = 2

    reduced: list[int] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        reduced.append(tensor.data_ptr())
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    (pair, shared), (alone, expected) = (
        guarded(FusedAdamW, [torch.ones(50), torch.ones(5)], monkeypatch) for _ in range(2)
    )
    for one, other in zip(shared, expected, strict=True):
        one.grad = torch.full_like(one, 0.25)
        other.grad = torch.full_like(other, 0.5)
    pair.step(3, OfTwo())  # type: ignore[arg-type]
    alone.step(3)
    assert reduced == [parameter.grad.data_ptr() for parameter in shared if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(shared, expected, strict=True))


class NoFloat64(TorchDispatchMode):
    """Raises where an operator takes or gives a float64 tensor, as Metal does; counts the others."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for each in tree_iter((args, kwargs, result)):
            dtype = each.dtype if isinstance(each, torch.Tensor) else each
            if isinstance(dtype, torch.dtype) and dtype in (torch.float64, torch.complex128):
                raise AssertionError(f"{func} uses {dtype}")
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_whole_step_as_on_metal_has_no_float64(
    dtype: torch.dtype, tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "adamw", SelectedAdamW)
    plan = plan_config(config_for(tiny_base, images, tmp_path / "x.safetensors"))
    base = load_base(plan.base, device=torch.device("cpu"), dtype=dtype)
    session = open_session(plan, base, Accelerator(), Silence())
    with session.attached(), NoFloat64() as mode:
        losses = [session.step(step) for step in range(2)]
    assert mode.calls > 1000
    assert all(loss.isfinite() for loss in losses)
    assert session.optimizer.skipped_steps() == 0


def test_the_check_for_float64_finds_it() -> None:
    with NoFloat64(), pytest.raises(AssertionError, match="float64"):
        torch.ones(3).double()


@pytest.mark.parametrize("kind", [FusedAdamW, SelectedAdamW])
@pytest.mark.parametrize("settings", [{"betas": (0.8, 0.999)}, {"epsilon": 1e-3}, {"weight_decay": 0.3}, {}])
def test_betas_epsilon_and_decay_are_those_of_the_settings(
    kind: type[FusedAdamW | SelectedAdamW], settings: dict[str, Any]
) -> None:
    """Algorithm 2 of Loshchilov & Hutter (2019) in float64."""
    section = OptimizerSection(**settings)
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 20))
    expected = weight.detach().double()
    adam, mean, square, rate = kind([weight], section), expected * 0, expected * 0, 0.01
    (first, second), epsilon, decay = section.betas, section.epsilon, section.weight_decay
    for step in range(1, 9):
        gradient = torch.sin(torch.arange(20.0) * step) * 1e-2
        weight.grad = gradient.clone()
        adam.update([rate], torch.tensor(True))
        mean = first * mean + (1 - first) * gradient.double()
        square = second * square + (1 - second) * gradient.double() ** 2
        unbiased = mean / (1 - first**step), square / (1 - second**step)
        expected = expected - rate * (unbiased[0] / (unbiased[1].sqrt() + epsilon) + decay * expected)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", ["0.9", "[0.9]", "[0.9, 1.0]", "[0.0, 0.9]", "[0.9, 0.99, 0.9]", "some"])
def test_betas_that_are_not_two_numbers_are_refused(value: str) -> None:
    needed = ("data.images=images", "data.trigger=zorb", "output.path=x.safetensors")
    with pytest.raises(ConfigError, match=r"optimizer\.betas = .*: must be two numbers between 0 and 1, for example"):
        load_config(None, (*needed, f"optimizer.betas={value}"))
    metadata = training_metadata(load_config(None, (*needed, "optimizer.betas=[0.8, 0.999]")), *facts())
    assert metadata["ss_optimizer"] == "torch.optim.AdamW(weight_decay=0.01,betas=(0.8, 0.999),eps=1e-08)"
