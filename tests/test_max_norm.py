"""The limit on the norm of each module's change: kohya's rule, for every kind, and in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sdlora.config.sections import OptimizerSection
from sdlora.lora.adapter import Adapter
from sdlora.lora.change import Change
from sdlora.lora.kinds import Decomposed
from sdlora.lora.new_trainable import KindSettings, trainable_for
from sdlora.training.optimizer import GuardedAdamW
from tests.training_runs import session_for

RANK, ALPHA = 3, 1.5
MODULES = {"linear": lambda: nn.Linear(24, 16), "convolution": lambda: nn.Conv2d(8, 12, 3)}


def adapter_on(kind: str, module: nn.Module, rank: int = RANK) -> Adapter[str]:
    settings = KindSettings(kind=kind)  # ty: ignore[invalid-argument-type]
    one = trainable_for("x", module.requires_grad_(False), settings, rank=rank, alpha=ALPHA)
    adapter = Adapter({"x": one}, seed=0, group_of=lambda name, tensor: "x")
    with torch.no_grad():
        adapter.parameters[0].copy_(torch.randn(adapter.parameters[0].shape))
    return adapter


def norm_of(change: Change, weight: Tensor) -> float:
    """‖ΔW‖ of the whole matrix in float64; of DoRA's direction."""
    inner = change.inner if isinstance(change, Decomposed) else change
    return inner.delta(weight.double()).norm().item()


@pytest.mark.parametrize("made", MODULES)
@pytest.mark.parametrize(("kind", "rank"), [("lora", 3), ("dora", 3), ("loha", 3), ("lokr", 1), ("lokr", 64)])
def test_a_larger_change_gets_the_norm_and_a_smaller_one_stays(kind: str, rank: int, made: str) -> None:
    torch.manual_seed(0)
    module = MODULES[made]()
    weight: Tensor = module.weight.detach()  # ty: ignore[invalid-assignment]
    adapter = adapter_on(kind, module, rank)
    before = {name: tensor.clone() for name, tensor in adapter._masters["x"].items()}
    (first,) = adapter.changes().values()
    norm = norm_of(first, weight)
    adapter.limit_norms(norm * 1.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter._masters["x"].items())
    adapter.limit_norms(norm / 7)
    (second,) = adapter.changes().values()
    assert norm_of(second, weight) == pytest.approx(norm / 7, rel=1e-5)
    ratios = [(tensor / before[name]).unique() for name, tensor in adapter._masters["x"].items() if name != "magnitude"]
    expected = 7 ** (-1 / len(ratios))
    assert all(ratio.allclose(torch.tensor(expected)) for ratio in ratios), "every factor has the same share"
    if kind == "dora":
        assert torch.equal(adapter._masters["x"]["magnitude"], before["magnitude"])


def test_the_rule_is_kohyas() -> None:
    """``apply_max_norm_regularization`` of kohya's networks/lora.py, written down again."""
    torch.manual_seed(0)
    adapter = adapter_on("lora", nn.Linear(24, 16))
    up, down = (adapter._masters["x"][name].clone() for name in ("up", "down"))
    updown = up @ down * (ALPHA / RANK)
    norm = updown.norm().clamp(min=1.0 / 2)
    ratio = (torch.clamp(norm, max=1.0) / norm) ** 0.5
    adapter.limit_norms(1.0)
    torch.testing.assert_close(adapter._masters["x"]["up"], up * ratio)
    torch.testing.assert_close(adapter._masters["x"]["down"], down * ratio)


def test_a_change_of_zero_stays_zero() -> None:
    adapter = adapter_on("lora", nn.Linear(24, 16))
    adapter._masters["x"]["up"].zero_()
    adapter.limit_norms(1e-6)
    assert adapter.parameters[0].isfinite().all()
    assert not adapter._masters["x"]["up"].any()


@pytest.mark.parametrize("more", ["optimizer.name=adamw", "optimizer.ema=0.5", "optimizer.name=schedule-free"])
def test_what_a_run_saves_keeps_to_the_limit(more: str, tiny_base: Path, images: Path, tmp_path: Path) -> None:
    limit, settings = 0.05, ("lora.max_norm=0.05", "lora.kind=dora", "optimizer.warmup_steps=0", "cache.disk=false")
    session = session_for(tiny_base, images, tmp_path / "x.safetensors", more, *settings, "optimizer.learning_rate=0.1")
    with session.attached():
        for step in range(3):
            session.step(step)
        with session.averaged():
            changes = session.adapter.changes()
    norms = [norm_of(change, torch.zeros(shape_of(change))) for change in changes.values()]
    assert max(norms) <= limit * (1 + 1e-5)
    assert max(norms) > 0.7 * limit, "training goes on below it"


def test_parameters_come_back_where_the_averages_cannot_be_limited() -> None:
    """Else what is saved after the error would be the averages in place of the parameters."""
    short = False

    def limit() -> None:
        if short:
            raise torch.OutOfMemoryError

    parameter = torch.nn.Parameter(torch.zeros(3))
    section = OptimizerSection(ema=0.9, warmup_steps=0)
    optimizer = GuardedAdamW([parameter], [0.1], section, steps=9, after_update=limit)
    for step in range(3):
        parameter.grad = torch.ones(3)
        optimizer.step(step)
    own, short = parameter.detach().clone(), True
    with pytest.raises(torch.OutOfMemoryError), optimizer.averaged():
        raise AssertionError("limited all the same")
    assert torch.equal(parameter, own)


def shape_of(change: Change) -> tuple[int, ...]:
    assert isinstance(change, Decomposed)
    assert change.inner.weight_shape is not None
    return change.inner.weight_shape


def test_a_limit_that_nothing_reaches_changes_nothing(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    found = []
    for more in ((), ("lora.max_norm=1e9",)):
        session = session_for(tiny_base, images, tmp_path / "x.safetensors", *more)
        with session.attached():
            for step in range(2):
                session.step(step)
        found.append([parameter.detach().clone() for parameter in session.adapter.parameters])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
