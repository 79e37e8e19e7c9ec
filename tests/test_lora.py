"""The low-rank mathematics against float64 formulas and peft."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdlora.lora.adapter import Adapter
from sdlora.lora.layers import LoraLinear
from sdlora.lora.low_rank import LowRank
from sdlora.lora.low_rank_trainable import TrainableLowRank
from sdlora.lora.stack import temporarily_applied
from sdlora.lora.targets import choose_targets


class Block(nn.Module):
    """Names as in a transformer block, sizes all different."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(6, 10), "to_k": nn.Linear(6, 10, bias=False)})
        self.attn["to_out"] = nn.ModuleList([nn.Linear(10, 6), nn.Identity()])
        self.proj = nn.Linear(6, 6)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.attn["to_q"](x), self.attn["to_k"](self.proj(x))
        return self.attn["to_out"][0](torch.tanh(q * k))


def named(block: nn.Module) -> dict[str, nn.Module]:
    return {f"unet.{name}": module for name, module in block.named_modules() if name}


def new_adapter(block: nn.Module, *, rank: int = 3, alpha: float = 6.0, seed: int = 0) -> Adapter[str]:
    targets = choose_targets(named(block), "attention")
    trainables = {name: TrainableLowRank(module=each, rank=rank, alpha=alpha) for name, each in targets.items()}
    return Adapter(trainables, seed=seed, group_of=lambda name, tensor: "unet")


def low_rank_changes(adapter: Adapter[str]) -> dict[str, LowRank]:
    return {name: change for name, change in adapter.changes().items() if isinstance(change, LowRank)}


def fill_up_matrices(adapter: Adapter[str]) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def test_targets_are_the_attention_projections() -> None:
    assert list(choose_targets(named(Block()), "attention")) == [
        "unet.attn.to_k",
        "unet.attn.to_out.0",
        "unet.attn.to_q",
    ]


@given(
    rows=st.integers(1, 7), wide=st.integers(1, 9), high=st.integers(1, 9), rank=st.integers(1, 5), bias=st.booleans()
)
@settings(deadline=None)
def test_layer_and_its_gradients_equal_the_formula_in_float64(
    rows: int, wide: int, high: int, rank: int, bias: bool
) -> None:
    torch.manual_seed(rows * 1000 + wide * 100 + high * 10 + rank)
    base = nn.Linear(wide, high, bias=bias).requires_grad_(False)
    down, up = nn.Parameter(torch.randn(rank, wide)), nn.Parameter(torch.randn(high, rank))
    layer, x = LoraLinear(base, down, up, 0.7), torch.randn(2, rows, wide, requires_grad=True)
    outer = torch.randn(2, rows, high)
    (layer(x) * outer).sum().backward()

    x64, down64, up64 = (t.detach().double().requires_grad_() for t in (x, down, up))
    y64 = x64 @ (base.weight.double() + 0.7 * up64 @ down64).T + (base.bias.double() if bias else 0)
    (y64 * outer.double()).sum().backward()
    torch.testing.assert_close(layer(x).double(), y64, rtol=1e-4, atol=1e-5)
    for ours, reference in ((x, x64), (down, down64), (up, up64)):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_changes_nothing() -> None:
    block, x = Block(), torch.randn(5, 6)
    before = block(x)
    adapter = new_adapter(block)
    adapter.attach(named(block))
    assert torch.equal(block(x), before)


def test_detach_is_the_exact_inverse_of_attach() -> None:
    block, x = Block(), torch.randn(5, 6)
    modules, before = named(block), block(x)
    state = {name: id(module) for name, module in block.named_modules()}
    adapter = new_adapter(block)
    adapter.attach(modules)
    fill_up_matrices(adapter)
    adapter.begin_step()
    assert not torch.equal(block(x), before)
    adapter.detach(modules)
    assert {name: id(module) for name, module in block.named_modules()} == state
    assert torch.equal(block(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_arrive_in_the_float32_masters(dtype: torch.dtype) -> None:
    block, x = Block().to(dtype), torch.randn(5, 6, dtype=dtype)
    adapter = new_adapter(block)
    adapter.attach(named(block))
    fill_up_matrices(adapter)
    (master,) = adapter.parameters
    for _ in range(2):
        adapter.begin_step()
        block(x).float().square().sum().backward()
        adapter.end_backward()
        assert master.grad is not None
        gradient = master.grad.clone()
    assert gradient.dtype == torch.float32
    assert (gradient != 0).float().mean() > 0.8
    before = {name: weight.up for name, weight in low_rank_changes(adapter).items()}
    with torch.no_grad():
        master.sub_(gradient)
    assert all(not torch.equal(before[name], weight.up) for name, weight in adapter.changes().items())
    adapter.begin_step()
    block(x).float().square().sum().backward()
    adapter.end_backward()
    assert not torch.equal(master.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_several_backward_passes_add_up_in_float32(dtype: torch.dtype) -> None:
    """The second is so much smaller than the first that bfloat16 and float16 would lose it in a sum."""
    block = Block().to(dtype)
    inputs = [scale * torch.randn(5, 6, dtype=dtype) for scale in (64.0, 2**-5)]
    adapter = new_adapter(block)
    adapter.attach(named(block))
    fill_up_matrices(adapter)
    (master,) = adapter.parameters

    def gradient(*passes: torch.Tensor) -> torch.Tensor:
        adapter.begin_step()
        for x in passes:
            block(x).float().sum().backward()
            adapter.end_backward()
        assert master.grad is not None
        return master.grad.clone()

    large, small = (gradient(x) for x in inputs)
    both = gradient(*inputs)
    if dtype == torch.float32:
        torch.testing.assert_close(both, large + small, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(both, large + small)
        assert not torch.equal(both, both.to(dtype).float())


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    first, again, other = (low_rank_changes(new_adapter(Block(), seed=seed)) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name].down, again[name].down)
        assert not torch.equal(first[name].down, other[name].down)
        bound = first[name].down.shape[1] ** -0.5
        assert first[name].down.abs().max() <= bound
        assert not first[name].up.any()


def test_attached_training_equals_merged_generation() -> None:
    block, x = Block(), torch.randn(5, 6)
    modules, adapter = named(block), new_adapter(block)
    fill_up_matrices(adapter)
    adapter.attach(modules)
    attached = block(x)
    adapter.detach(modules)
    change = {name: (weight, 1.0) for name, weight in adapter.changes().items()}
    with temporarily_applied(modules, [change]):
        torch.testing.assert_close(block(x), attached, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_sums_in_float32_and_restores_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 9).to(dtype)
    original = layer.weight.detach().clone()
    changes = [LowRank(down=torch.randn(r, 12), up=torch.randn(9, r), alpha=a) for r, a in ((2, 1.0), (4, 8.0))]
    with temporarily_applied(
        {"unet.x": layer}, [{"unet.x": (change, w)} for change, w in zip(changes, (0.3, -1.5), strict=True)]
    ):
        expected = original.double()
        for change, w in zip(changes, (0.3, -1.5), strict=True):
            expected = expected + w * change.alpha / change.rank * change.up.double() @ change.down.double()
        torch.testing.assert_close(layer.weight, expected.to(dtype), rtol=1e-3, atol=1e-5)
    assert torch.equal(layer.weight, original)


def test_merging_restores_after_an_error() -> None:
    layer = nn.Linear(4, 4)
    original = layer.weight.detach().clone()
    change = LowRank(down=torch.randn(1, 4), up=torch.randn(4, 1), alpha=1.0)
    with pytest.raises(RuntimeError, match="boom"), temporarily_applied({"unet.x": layer}, [{"unet.x": (change, 1.0)}]):
        raise RuntimeError("boom")
    assert torch.equal(layer.weight, original)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 20))
@settings(deadline=None)
def test_norm_equals_that_of_the_full_change(rank: int, wide: int, high: int, alpha: float) -> None:
    change = LowRank(down=torch.randn(rank, wide), up=torch.randn(high, rank), alpha=alpha)
    assert change.norm() == pytest.approx(
        float(torch.linalg.norm(change.delta(torch.zeros(change.weight_shape)).double())), rel=1e-4
    )


def test_convolution_change_equals_composed_convolutions() -> None:
    torch.manual_seed(0)
    down, up = torch.randn(3, 5, 3, 3), torch.randn(7, 3, 1, 1)
    change, x = LowRank(down=down, up=up, alpha=6.0), torch.randn(1, 5, 8, 8)
    composed = nn.functional.conv2d(nn.functional.conv2d(x, down, padding=1), up) * 2.0
    torch.testing.assert_close(
        nn.functional.conv2d(x, change.delta(torch.zeros(change.weight_shape)), padding=1),
        composed,
        rtol=1e-4,
        atol=1e-4,
    )
