"""Merging in the memory of the weights, as on a GPU: the same values, the same tensors, every bit back, little memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdlora.lora import merging
from sdlora.lora.change import Change
from sdlora.lora.kinds import Decomposed, Full, Hadamard, Kronecker, Orthogonal, Scaling
from sdlora.lora.low_rank import LowRank
from sdlora.lora.stack import temporarily_applied

WIDE, HIGH = 24, 16


def low_rank(wide: int = WIDE, high: int = HIGH, rank: int = 3) -> LowRank:
    return LowRank(down=torch.randn(rank, wide), up=torch.randn(high, rank), alpha=2.0)


def changes() -> dict[str, Change]:
    """One of each kind, for a weight of (HIGH, WIDE)."""
    halves = {"w1_a": (HIGH, 2), "w1_b": (2, WIDE), "w2_a": (HIGH, 2), "w2_b": (2, WIDE)}
    return {
        "lora": low_rank(),
        "loha": Hadamard(**{name: torch.randn(shape) for name, shape in halves.items()}, alpha=1.0),
        "lokr": Kronecker(w1=torch.randn(4, 4), w2=torch.randn(4, 6), alpha=1.0),
        "ia3": Scaling(weight=torch.randn(HIGH), on_input=False),
        "full": Full(diff=torch.randn(HIGH, WIDE), bias=torch.randn(HIGH)),
        "oft": Orthogonal(blocks=torch.randn(4, 4, 4), alpha=0.0),
        "dora": Decomposed(inner=low_rank(), magnitude=torch.rand(HIGH, 1) + 0.5),
    }


@pytest.mark.parametrize("kind", changes())
def test_reading_no_weight_is_true_of_every_kind_that_says_so(kind: str) -> None:
    change = changes()[kind]
    first, second = (change.delta(torch.randn(HIGH, WIDE)) for _ in range(2))
    assert torch.equal(first, second) == (not change.reads_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_is_the_formula_in_float64_rounded_once_in_the_same_tensors(dtype: torch.dtype) -> None:
    """The bound: half a unit of the dtype's last place, and the error of a float32 sum."""
    made = changes()
    layers = {name: nn.Linear(WIDE, HIGH, bias=name != "bare").to(dtype) for name in ("one", "two", "bare")}
    strengths = {"one": 0.3, "two": -0.7, "bare": 1.0}
    loras = [{name: (change, strength) for name, strength in strengths.items()} for change in made.values()]
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    pristine = [(parameter.detach().clone(), parameter.data_ptr()) for parameter in parameters]
    before = {name: {k: v.clone() for k, v in layer.state_dict().items()} for name, layer in layers.items()}
    with temporarily_applied(layers, loras):
        for name, layer in layers.items():
            weight = before[name]["weight"].double()
            exact = weight + strengths[name] * sum(change.delta(weight) for change in made.values())
            bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
            assert ((layer.weight.double() - exact).abs() <= bound).all()
            bias = before[name].get("bias", torch.zeros(HIGH)).double() + strengths[name] * made["full"].bias.double()  # ty: ignore[unresolved-attribute]
            assert ((layer.bias.double() - bias).abs() <= torch.finfo(dtype).eps / 2 * bias.abs() + 1e-6).all()
        assert [parameter.data_ptr() for parameter in parameters] == [place for _, place in pristine]
        assert not torch.equal(layers["one"].weight, pristine[0][0])
    assert layers["bare"].bias is None
    for parameter, (values, place) in zip(parameters, pristine, strict=True):
        assert torch.equal(parameter, values)
        assert parameter.data_ptr() == place


class Broken(LowRank):
    def matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize("shape", [(90, 40), (33, 8, 3, 3), (1, 7)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_rows_merged_at_a_time_have_the_bits_of_the_whole_sum(
    shape: tuple[int, ...], memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits, over its own pristine values, in parts that do not divide the weight."""
    monkeypatch.setattr(merging, "ELEMENTS_AT_ONCE", 300)
    out, *inner = shape
    pairs: list[tuple[Change, float]] = [
        (LowRank(down=torch.randn(4, *inner), up=torch.randn(out, 4, *(1 for _ in inner[1:])), alpha=2.0), strength)
        for strength in (0.7, -0.3)
    ]
    weight = torch.randn(shape).bfloat16()
    weight = weight.to(memory_format=memory) if len(shape) == 4 else weight
    whole = merging.merged_weight(weight, pairs).bfloat16()
    exact = weight.double() + sum(change.delta(weight.double()) * strength for change, strength in pairs)
    merging.merge_into(weight, weight, pairs)
    assert torch.equal(weight, whole)
    torch.testing.assert_close(weight.double(), exact, rtol=2**-8, atol=1e-5)


def test_a_change_of_other_outputs_is_refused_before_anything_is_written() -> None:
    weight = torch.ones(HIGH, WIDE)
    with pytest.raises(RuntimeError):
        merging.merge_into(weight, weight, [(low_rank(high=HIGH + 1), 1.0)])
    with pytest.raises(RuntimeError):
        merging.merge_into(weight, weight, [(low_rank(wide=WIDE + 1), 1.0)])
    assert torch.equal(weight, torch.ones(HIGH, WIDE))


def test_everything_is_restored_where_merging_fails_half_way() -> None:
    layers = {name: nn.Linear(WIDE, HIGH, bias=name != "b") for name in "abc"}
    pristine = {name: {k: v.clone() for k, v in layer.state_dict().items()} for name, layer in layers.items()}
    whole = Full(diff=torch.randn(HIGH, WIDE), bias=torch.randn(HIGH))
    broken = Broken(down=torch.randn(1, WIDE), up=torch.randn(HIGH, 1), alpha=1.0)
    with (
        pytest.raises(torch.OutOfMemoryError),
        temporarily_applied(layers, [{"a": (whole, 1.0), "b": (whole, 1.0), "c": (broken, 1.0)}]),
    ):
        raise AssertionError("merged all the same")
    for name, layer in layers.items():
        assert layer.state_dict().keys() == pristine[name].keys()
        assert all(torch.equal(value, pristine[name][key]) for key, value in layer.state_dict().items())


def test_weights_that_modules_share_come_back() -> None:
    first, second = nn.Linear(WIDE, HIGH), nn.Linear(WIDE, HIGH)
    second.weight = first.weight
    pristine = first.weight.detach().clone()
    change = (low_rank(), 1.0)
    with temporarily_applied({"a": first, "b": second}, [{"a": change, "b": change}]):
        assert not torch.equal(first.weight, pristine)
    assert torch.equal(first.weight, pristine)


def test_a_copy_that_cuda_may_not_have_written_yet_is_not_read_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pristine values come to main memory while the host goes on: merging reads those on the device."""
    monkeypatch.setattr(merging, "_in_main_memory", lambda parameter: torch.full_like(parameter, torch.nan))
    layer = nn.Linear(WIDE, HIGH).half()
    weight, bias = (parameter.detach().double().clone() for parameter in (layer.weight, layer.bias))
    whole = Full(diff=torch.randn(HIGH, WIDE), bias=torch.randn(HIGH))
    merging.MergedModule(layer).set(((whole, 0.5),))
    assert whole.diff is not None
    assert whole.bias is not None
    torch.testing.assert_close(layer.weight.double(), weight + 0.5 * whole.diff.double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.bias.double(), bias + 0.5 * whole.bias.double(), rtol=1e-3, atol=1e-3)


class LiveBytes(TorchDispatchMode):
    """The most bytes of ``dtype`` that tensors made under this mode held at once."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.peak = dtype, 0
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        alive = [tensor for made in self._made if (tensor := made()) is not None and tensor.dtype == self.dtype]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
        self.peak = max(self.peak, sum(storages.values()))
        return result


def test_a_device_holds_one_more_weight_while_merging_however_many_loras_there_are() -> None:
    """The base is float16, so that float32 is what merging itself needs: a weight, and thin matrices."""
    layers = {f"{number}": nn.Linear(256, 512).half() for number in range(6)}
    loras = [{name: (low_rank(256, 512), 0.5) for name in layers} for _ in range(3)]
    with LiveBytes(torch.float32) as live, temporarily_applied(layers, loras):
        pass
    weight = 256 * 512 * 4
    assert weight <= live.peak < 1.1 * weight
