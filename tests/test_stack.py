"""A stack of LoRAs: any sequence of settings, the pristine bits after it, and what lies beside layers."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from sdlora.errors import CompatibilityError
from sdlora.lora.change import Change
from sdlora.lora.kinds import Decomposed, Full, Hadamard, Kronecker, Scaling
from sdlora.lora.low_rank import LowRank
from sdlora.lora.merging import MergedModule
from sdlora.lora.stack import Stack
from sdlora.lora.targets import choose_targets
from tests.tiny import opened


def named(model: nn.Module) -> dict[str, nn.Module]:
    return {f"m.{name}" if name else "m": module for name, module in model.named_modules()}


class Block(nn.Module):
    """A linear layer, a strided convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bare = nn.Linear(8, 6), nn.Linear(6, 6, bias=False)
        self.conv = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 5, 5, 8) -> (b, 4, 3, 3)."""
        return self.norm(self.conv(self.bare(self.linear(x)).permute(0, 3, 1, 2)))


def low_rank(seed: int, *shape: int, rank: int = 3) -> LowRank:
    made = torch.Generator().manual_seed(seed)
    out, *inner = shape
    ones = [1] * (len(inner) - 1)
    return LowRank(
        down=torch.randn(rank, *inner, generator=made) / 3, up=torch.randn(out, rank, *ones, generator=made), alpha=1.5
    )


def linear_changes(seed: int) -> dict[str, Change]:
    """One of each kind, for ``linear``."""
    torch.manual_seed(seed)
    halves = {"w1_a": (6, 2), "w1_b": (2, 8), "w2_a": (6, 2), "w2_b": (2, 8)}
    return {
        "lora": low_rank(seed, 6, 8),
        "loha": Hadamard(**{name: torch.randn(shape) for name, shape in halves.items()}, alpha=1.0),
        "lokr": Kronecker(w1=torch.randn(2, 2), w2=torch.randn(3, 4), alpha=1.0),
        "ia3": Scaling(weight=torch.randn(6), on_input=False),
        "full": Full(diff=torch.randn(6, 8), bias=torch.randn(6)),
        "dora": Decomposed(inner=low_rank(seed + 1, 6, 8), magnitude=torch.rand(6, 1) + 0.5),
    }


def lora(seed: int, weight: float, kind: str = "lora") -> dict[str, tuple[Change, float]]:
    changes: dict[str, Change] = {
        "m.linear": linear_changes(seed)[kind],
        "m.bare": Full(bias=torch.full((6,), float(seed))),
        "m.conv": low_rank(seed, 4, 6, 3, 3),
        "m.norm": Full(diff=torch.full((4,), 0.1 * seed), of_norm=True),
    }
    return {name: (change, weight) for name, change in changes.items()}


def expected_output(model: Block, loras: list[dict[str, tuple[Change, float]]], x: Tensor) -> Tensor:
    """The model in float64 with the sum of all changes in its weights."""
    exact = Block().double()
    exact.load_state_dict(model.state_dict(), strict=False)
    exact.double()
    if model.bare.bias is None:
        exact.bare.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    with torch.no_grad():
        for name, module in named(exact).items():
            changes = [entry[name] for entry in loras if name in entry]
            if changes:
                pristine: Any = module.weight.clone()
                module.weight += sum(w * change.delta(pristine) for change, w in changes)  # ty: ignore
                for change, w in changes:
                    if (move := change.bias_delta()) is not None:
                        module.bias += w * move  # ty: ignore
        return exact(x.double())


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def live_bytes() -> int:
    """Bytes of all tensors that exist, each storage counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_pristine_bits_come_back_after_a_hundred_random_operations(dtype: torch.dtype, tiny_base: Path) -> None:
    """On a base, its text encoder included, whose memory is that of the start again."""
    base = opened(tiny_base, dtype)
    # Every eighth module, so that a hundred operations take a second.
    targets = list(choose_targets(base.modules(), "all-linear").items())[::8]
    fitted = [
        {name: (low_rank(seed, *layer.weight.shape), 1.0) for name, layer in targets}  # ty: ignore
        for seed in range(3)
    ]
    encoder = base.text_encoders[0].model
    pristine = bits(base.unet), bits(encoder)
    places = [parameter.data_ptr() for model in (base.unet, encoder) for parameter in model.parameters()]
    draw, stack = random.Random(int(dtype.itemsize)), Stack(base.modules())
    before = live_bytes()
    for _ in range(100):
        if draw.random() < 0.2:
            stack.restore()
            continue
        chosen = draw.sample(fitted, draw.randint(0, 3))
        weighed = [{name: (change, draw.uniform(-2, 2)) for name, (change, _) in lora.items()} for lora in chosen]
        varying = [number for number in range(len(weighed)) if draw.random() < 0.3]
        stack.set(weighed, varying=varying)
        if draw.random() < 0.5:
            stack.vary([draw.random() for _ in varying])
    stack.set([fitted[0]])
    assert any(not torch.equal(value, pristine[1][name]) for name, value in encoder.state_dict().items())
    stack.restore()
    for model, values in zip((base.unet, encoder), pristine, strict=True):
        assert model.state_dict().keys() == values.keys()
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert [p.data_ptr() for model in (base.unet, encoder) for p in model.parameters()] == places
    assert abs(live_bytes() - before) < 0.01 * before
    assert stack.touched == frozenset()


def test_what_is_set_depends_on_nothing_that_was_set_before() -> None:
    torch.manual_seed(0)
    first, second = Block().bfloat16(), Block().bfloat16()
    second.load_state_dict(first.state_dict())
    one, other = Stack(named(first)), Stack(named(second))
    loras = [lora(1, 0.7, "dora"), lora(2, -0.4, "ia3")]
    other.set(loras)
    for earlier in ([lora(1, 1.0)], [lora(2, 0.1), lora(1, 2.0, "loha"), lora(3, 1.0)], []):
        one.set(earlier)
    one.set(loras)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_only_modules_whose_changes_differ_are_merged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block()
    everywhere, linear = lora(1, 1.0), {"m.linear": (low_rank(4, 6, 8), 1.0)}
    stack, merged = Stack(named(model)), []
    plain = MergedModule.set
    monkeypatch.setattr(MergedModule, "set", lambda self, changes: (merged.append(self), plain(self, changes))[1])
    stack.set([everywhere, linear])
    assert len(merged) == 4
    merged.clear()
    stack.set([everywhere, {"m.linear": (linear["m.linear"][0], 0.5)}])
    assert [module._module for module in merged] == [model.linear]
    merged.clear()
    stack.set([everywhere, {"m.linear": (linear["m.linear"][0], 0.5)}])
    assert merged == []


def test_a_weight_of_zero_leaves_the_module_alone() -> None:
    model = Block()
    pristine = bits(model)
    stack = Stack(named(model))
    stack.set([lora(1, 1.0)])
    stack.set([lora(1, 0.0)])
    assert stack.touched == frozenset()
    assert all(torch.equal(value, pristine[name]) for name, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("kind", linear_changes(0))
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.25, 0.0), (0.0, 1.0), (-0.5, 2.0)])
def test_weights_that_vary_are_those_of_the_formula_in_float64(kind: str, factors: tuple[float, float]) -> None:
    torch.manual_seed(3)
    model, x = Block(), torch.randn(2, 5, 5, 8)
    before, pristine = model(x), bits(model)
    loras = [lora(1, 0.6, kind), lora(2, -0.3), lora(3, 0.8)]
    scaled = [
        {name: (change, weight * factor) for name, (change, weight) in one.items()}
        for one, factor in zip(loras, (factors[0], 1.0, factors[1]), strict=True)
    ]
    expected = expected_output(model, scaled, x)
    stack = Stack(named(model))
    stack.set(loras, varying=[0, 2])
    stack.vary(factors)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    stack.restore()
    assert torch.equal(model(x), before)
    assert model.state_dict().keys() == pristine.keys()


@torch.no_grad()
def test_low_rank_weights_that_vary_merge_nothing_and_replace_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(), torch.randn(1, 5, 5, 8)
    changes = {"m.linear": (low_rank(1, 6, 8), 1.0), "m.conv": (low_rank(2, 4, 6, 3, 3), 1.0)}
    stack = Stack(named(model))
    stack.set([changes], varying=[0])
    full = model(x)
    places = [buffer.data_ptr() for buffer in model.buffers()]
    monkeypatch.setattr(MergedModule, "__init__", None)
    stack.vary([0.0])
    assert not torch.allclose(model(x), full)
    stack.vary([1.0])
    assert torch.equal(model(x), full)
    assert [buffer.data_ptr() for buffer in model.buffers()] == places


def test_after_an_error_everything_is_pristine() -> None:
    model = Block()
    pristine, linear = bits(model), model.linear
    stack = Stack(named(model))
    stack.set([lora(1, 1.0)], varying=[0])
    with pytest.raises(RuntimeError):
        stack.set([lora(2, 1.0), {"m.norm": (low_rank(1, 6, 8), 1.0)}])
    assert model.linear is linear
    assert all(torch.equal(value, pristine[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyError):
        stack.set([{"m.nothing": (low_rank(1, 6, 8), 1.0)}])
    stack.set([lora(1, 1.0)])
    assert not torch.equal(model.linear.weight, pristine["linear.weight"])


@torch.no_grad()
@pytest.mark.parametrize("kind", linear_changes(0))
def test_an_offloaded_layer_gets_its_changes_beside_it(kind: str) -> None:
    """accelerate keeps the weights in main memory, and the layers are empty until they are called."""
    torch.manual_seed(5)
    model, x = Block(), torch.randn(2, 5, 5, 8)
    loras = [{name: entry for name, entry in lora(n, 0.5, kind).items() if name != "m.norm"} for n in (1, 2)]
    expected = expected_output(model, loras, x)
    before = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    stack = Stack(named(model))
    stack.set(loras)
    assert model.linear.base.weight.device.type == "meta"
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    stack.restore()
    assert torch.equal(model(x), before)
    with pytest.raises(CompatibilityError, match=r"m\.norm: a GroupNorm whose weight cannot be changed where it is"):
        stack.set([lora(1, 1.0)])


def test_weights_that_modules_share_get_the_changes_of_both() -> None:
    first, second = nn.Linear(8, 6), nn.Linear(8, 6)
    second.weight = first.weight
    pristine = first.weight.detach().clone()
    one, other = low_rank(1, 6, 8), low_rank(2, 6, 8)
    stack = Stack({"a": first, "b": second})
    stack.set([{"b": (other, 1.0)}])
    stack.set([{"a": (one, 0.5), "b": (other, -1.0)}])
    exact = pristine.double() + 0.5 * one.delta(pristine.double()) - other.delta(pristine.double())
    torch.testing.assert_close(first.weight.double(), exact, rtol=1e-6, atol=1e-6)
    stack.restore()
    assert torch.equal(first.weight, pristine)
