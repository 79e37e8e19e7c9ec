"""LoRAs beside quantised layers, against the same changes merged into the expanded weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdlora.lora.change import Change
from sdlora.lora.kinds import Decomposed, Full, Hadamard, Kronecker, Scaling
from sdlora.lora.low_rank import LowRank
from sdlora.lora.quantized import QUANTIZED
from sdlora.lora.stack import temporarily_applied

CPU = torch.device("cpu")


def low_rank(rank: int, *kernel: int) -> LowRank:
    down, up = torch.randn(rank, 16, *kernel) / 4, torch.randn(12, rank, *kernel) / 4
    return LowRank(down=down, up=up, alpha=rank / 2)


def changes() -> dict[str, Change]:
    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(12, 2) / 2, torch.randn(2, 16) / 2

    (a, b), (c, d) = pair(), pair()
    return {
        "lora": low_rank(3),
        "lora of a 1 x 1 convolution": low_rank(2, 1, 1),
        "lora with a core": LowRank(
            down=torch.randn(2, 16, 1, 1), up=torch.randn(12, 2, 1, 1), mid=torch.randn(2, 2, 1, 1), alpha=1.0
        ),
        "loha": Hadamard(w1_a=a, w1_b=b, w2_a=c, w2_b=d, alpha=1.0),
        "lokr": Kronecker(w1=torch.randn(3, 4), w2=torch.randn(4, 4), alpha=1.0),
        "ia3": Scaling(weight=torch.randn(12) / 4, on_input=False),
        "dora": Decomposed(inner=low_rank(2), magnitude=torch.rand(12, 1) + 0.5),
        "full": Full(diff=torch.randn(12, 16) / 4, bias=torch.randn(12)),
        "bias": Full(bias=torch.randn(12)),
    }


def block(kind: str, *, bias: bool) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Modules with a quantised and a whole layer, and the same with the expanded weight in its place."""
    quantized = QUANTIZED[kind](nn.Linear(16, 12, bias=bias), CPU)
    expanded = nn.Linear(16, 12, bias=bias)
    expanded.weight = nn.Parameter(quantized.dense())
    expanded.bias = quantized.bias
    both = []
    for first in (quantized, expanded):
        parent = nn.Module()
        parent.first = first
        torch.manual_seed(5)
        parent.second = nn.Linear(12, 12)
        both.append({"x": parent, "x.first": parent.first, "x.second": parent.second})
    return both[0], both[1]


def run(modules: dict[str, nn.Module], x: torch.Tensor) -> torch.Tensor:
    return modules["x"].second(modules["x"].first(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_change_beside_a_quantised_layer(kind: str, change: str, bias: bool) -> None:
    ours, reference = block(kind, bias=bias)
    other = LowRank(down=torch.ones(1, 12), up=torch.ones(12, 1), alpha=0.1)
    loras = [{"x.first": (changes()[change], 0.6), "x.second": (other, 1.0)}, {"x.first": (low_rank(4), -0.8)}]
    x, layer = torch.randn(2, 5, 16), ours["x"].first
    before = run(ours, x)
    with temporarily_applied(reference, loras):
        expected = run(reference, x)
    with temporarily_applied(ours, loras):
        torch.testing.assert_close(run(ours, x), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2
    assert ours["x"].first is layer
    assert torch.equal(run(ours, x), before)


@torch.no_grad()
def test_a_change_that_does_not_fit_leaves_no_trace() -> None:
    modules, _ = block("nf4", bias=True)
    x, layer = torch.randn(5, 16), modules["x"].first
    before = run(modules, x)
    bad = {"x.second": (low_rank(2), 1.0), "x.first": (low_rank(2), 1.0)}
    with pytest.raises(RuntimeError), temporarily_applied(modules, [bad]):
        pass
    assert modules["x"].first is layer
    assert torch.equal(run(modules, x), before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_a_small_change_is_not_rounded_away(dtype: torch.dtype) -> None:
    """‖ΔW‖ is a thousandth of ‖W‖: merged into bfloat16, half of it is lost."""
    base = nn.Linear(64, 64, bias=False)
    layer = QUANTIZED["int8"](base.to(dtype), CPU)
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    change = LowRank(down=down, up=up * (base.weight.float().norm() / (up @ down).norm() / 1000), alpha=4.0)
    parent = nn.Module()
    parent.layer = layer
    unit = torch.eye(64, dtype=dtype)
    with temporarily_applied({"x": parent, "x.layer": layer}, [{"x.layer": (change, 1.0)}]):
        down, up = parent.layer.down, parent.layer.up
    delta = unit.float() @ (up.float() @ down.float()).T
    exact = change.delta(torch.zeros(64, 64)).T
    assert (delta - exact).norm() < 0.01 * exact.norm()
