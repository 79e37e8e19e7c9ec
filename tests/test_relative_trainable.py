"""Changes that start at principal singular vectors or at orthogonal factors, against float64 formulas and peft."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sdlora.lora.adapter import Adapter
from sdlora.lora.low_rank import LowRank
from sdlora.lora.low_rank_trainable import TrainableLowRank
from sdlora.lora.quantized import QUANTIZED, FrozenLinear
from sdlora.lora.relative_layer import RelativeLinear
from sdlora.lora.relative_trainable import Init, TrainableRelative, orthonormal, principal_factors
from sdlora.training.new_adapter import new_adapter
from sdlora.training.plan import plan_config
from tests.tiny import opened
from tests.training_runs import config_for

RANK, ALPHA = 3, 1.5
INITS: tuple[Init, ...] = ("pissa", "orthogonal")


def frozen(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(24, 40).to(dtype).requires_grad_(False)


def adapter_on(linear: FrozenLinear, init: Init, *, seed: int = 0) -> tuple[Adapter[str], dict[str, nn.Module]]:
    """Attached; both tensors in one group each."""
    block = nn.Sequential(linear)
    modules = {"unet": block, "unet.0": linear}
    trainable = TrainableRelative(module=linear, rank=RANK, alpha=ALPHA, init=init, name="unet.0", seed=seed)
    adapter = Adapter({"unet.0": trainable}, seed=seed, group_of=lambda name, tensor: tensor)
    adapter.attach(modules)
    return adapter, modules


def factors(linear: FrozenLinear, init: Init) -> tuple[Tensor, Tensor]:
    """D₀ and U₀, as a change of zero differences has them in its second half and in its first."""
    trainable = TrainableRelative(module=linear, rank=RANK, alpha=ALPHA, init=init, name="unet.0", seed=0)
    change = trainable.change({key: torch.zeros(shape) for key, shape in trainable.shapes.items()})
    return change.down[RANK:], change.up[:, :RANK]


def low_rank(adapter: Adapter[str]) -> LowRank:
    change = adapter.changes()["unet.0"]
    assert isinstance(change, LowRank)
    return change


def fill(adapter: Adapter[str], scale: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter.copy_(scale * torch.randn(parameter.shape))


def test_principal_factors_are_the_best_change_to_zero() -> None:
    """By the singular values of ``torch.linalg.svd`` in float64; a spectrum as that of trained weights."""
    weight = torch.randn(60, 6) @ torch.randn(6, 50) + 0.3 * torch.randn(60, 50)
    down, up = principal_factors(weight, 6, scale=0.5)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    best = u[:, :6] * s[:6] @ vh[:6]
    assert (0.5 * up.double() @ down.double() - best).norm() < 1e-4 * best.norm()
    # Both have the same share of the singular values.
    torch.testing.assert_close(up.double().norm(dim=0) ** 2, s[:6] / 0.5, rtol=1e-4, atol=0)
    torch.testing.assert_close(down.double().norm(dim=1) ** 2, s[:6] / 0.5, rtol=1e-4, atol=0)


def test_a_rank_beyond_the_weight_is_filled_with_zeros() -> None:
    weight = torch.randn(4, 9)
    down, up = principal_factors(weight, 7, scale=2.0)
    assert (down.shape, up.shape) == ((7, 9), (4, 7))
    torch.testing.assert_close(2 * up @ down, weight)
    assert not down[4:].any()


class OnMetal(torch.Tensor):
    """Says that it is on an Apple GPU, where this machine can compute nothing, until it is moved."""

    @property
    def device(self) -> torch.device:  # ty: ignore[invalid-method-override]
        return torch.device("mps")

    def to(self, *args: torch.device | torch.dtype) -> Tensor:
        return self.as_subclass(torch.Tensor).to(*args)


def test_principal_factors_of_a_weight_on_metal_are_computed_on_the_cpu() -> None:
    weight = torch.randn(12, 9)
    for ours, expected in zip(
        principal_factors(weight.as_subclass(OnMetal), 3, scale=0.5),
        principal_factors(weight, 3, scale=0.5),
        strict=True,
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(3, 24), (40, 3), (5, 4)])
def test_orthonormal_rows_or_columns_by_seed_and_name(shape: tuple[int, int]) -> None:
    matrix = orthonormal(shape, 1, "unet.a").double()
    gram = matrix @ matrix.T if shape[0] < shape[1] else matrix.T @ matrix
    torch.testing.assert_close(gram, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(orthonormal(shape, 1, "unet.a").double(), matrix)
    assert not torch.equal(orthonormal(shape, 2, "unet.a").double(), matrix)
    assert not torch.equal(orthonormal(shape, 1, "unet.b").double(), matrix)


def test_each_start_has_the_factors_that_its_name_says() -> None:
    linear = frozen()
    down, up = (factor.double() for factor in factors(linear, "orthogonal"))
    torch.testing.assert_close(down @ down.T, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(up.T @ up, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-6)
    down, up = (factor.double() for factor in factors(linear, "pissa"))
    values = torch.linalg.svdvals(linear.weight.double())[:RANK]
    torch.testing.assert_close(torch.linalg.svdvals(up @ down)[:RANK] * ALPHA / RANK, values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_changed_at_the_start_and_the_weights_come_back(init: Init, dtype: torch.dtype) -> None:
    linear, x = frozen(dtype), torch.randn(5, 24).to(dtype)
    before, expected = linear.weight.clone(), linear(x)
    adapter, modules = adapter_on(linear, init)
    adapter.begin_step()
    assert torch.equal(modules["unet"](x), expected)
    assert low_rank(adapter).norm() == 0
    assert not low_rank(adapter).delta(torch.zeros(40, 24)).any()
    fill(adapter)
    adapter.detach(modules)
    assert modules["unet"].get_submodule("0") is linear
    assert torch.equal(linear.weight, before)
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("base", ["linear", "int8", "nf4"])
def test_output_and_gradients_equal_float64_autograd_of_the_formula(init: Init, base: str) -> None:
    linear: FrozenLinear = frozen() if base == "linear" else QUANTIZED[base](nn.Linear(24, 40), torch.device("cpu"))
    weight = (linear.weight if isinstance(linear, nn.Linear) else linear.dense()).double()
    start_down, start_up = (factor.double() for factor in factors(linear, init))
    adapter, modules = adapter_on(linear, init)
    fill(adapter)
    down, up = (p.detach().double().view(s) for p, s in zip(adapter.parameters, ((RANK, 24), (40, RANK)), strict=True))
    d, u = (start_down + down).requires_grad_(), (start_up + up).requires_grad_()
    x, grad = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 40)
    wide = x.detach().double().requires_grad_()
    changed = weight + ALPHA / RANK * (u @ d - start_up @ start_down)
    expected = wide @ changed.T + linear.bias.double()
    expected.backward(grad.double())
    adapter.begin_step()
    y = modules["unet"](x)
    y.backward(grad)
    adapter.end_backward()
    pairs = [(y, expected), (x.grad, wide.grad)]
    pairs += [(p.grad, w.grad.flatten()) for p, w in zip(adapter.parameters, (d, u), strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    delta = low_rank(adapter).delta(torch.zeros(40, 24, dtype=torch.float64))
    torch.testing.assert_close(delta, changed.detach() - weight, rtol=1e-5, atol=1e-6)


def test_the_plain_form_is_the_same() -> None:
    linear, (down, up) = frozen(), (torch.randn(RANK, 24), torch.randn(40, RANK))
    start = (torch.randn(RANK, 24), torch.randn(40, RANK))
    gradients = (torch.zeros(RANK, 24), torch.zeros(40, RANK))
    x = torch.randn(7, 24)
    layers = [
        RelativeLinear(linear, *(m.clone().requires_grad_() for m in (down, up)), start, 0.5, gradients=each)
        for each in (None, gradients)
    ]
    ys = [layer(x) for layer in layers]
    torch.testing.assert_close(*ys)
    for y in ys:
        (y**2).sum().backward()
    for mine, leaf in zip(gradients, (layers[0].down, layers[0].up), strict=True):
        torch.testing.assert_close(mine, leaf.grad)


def test_the_principal_part_is_that_of_pefts_pissa() -> None:
    linear = frozen()
    theirs = get_peft_model(
        nn.Sequential(deepcopy(linear)),
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights="pissa"),
    ).base_model.model[0]
    down, up = factors(linear, "pissa")
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(up @ down, product.detach(), rtol=0, atol=1e-4)


def test_training_steps_equal_those_of_peft_on_the_residual() -> None:
    linear = frozen()
    theirs = get_peft_model(
        nn.Sequential(nn.Linear(24, 40)),
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=False),
    ).base_model.model[0]
    down, up = factors(linear, "pissa")
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(down)
        theirs.lora_B["default"].weight.copy_(up)
        theirs.base_layer.weight.copy_(linear.weight - ALPHA / RANK * up @ down)
        theirs.base_layer.bias.copy_(linear.bias)
    pairs = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    adapter, modules = adapter_on(linear, "pissa")
    optimizers = [torch.optim.SGD(each, lr=0.05) for each in (adapter.parameters, pairs)]
    for _ in range(3):
        x, target = torch.randn(6, 24), torch.randn(6, 40)
        adapter.begin_step()
        ((modules["unet"](x) - target) ** 2).mean().backward()
        adapter.end_backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        ((theirs(x) - target) ** 2).mean().backward()
        optimizers[1].step()
    ours = linear.weight + low_rank(adapter).delta(torch.zeros(40, 24))
    expected = theirs.base_layer.weight + ALPHA / RANK * pairs[1] @ pairs[0]
    assert low_rank(adapter).norm() > 1e-2
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_the_file_in_half_precision_loses_only_the_rounding_of_its_factors() -> None:
    """[U, -U₀] [D; D₀] would lose as much of the principal part, which is a hundred times larger here."""
    linear = frozen()
    linear.weight.mul_(100)
    adapter, _ = adapter_on(linear, "pissa")
    fill(adapter, 1e-3)
    change = low_rank(adapter)
    delta = change.delta(torch.zeros(40, 24))
    half = LowRank(down=change.down.half(), up=change.up.half(), alpha=change.alpha).delta(torch.zeros(40, 24))
    assert (half - delta).norm() < 1e-3 * delta.norm()


@pytest.mark.parametrize(("init", "rank"), [("default", 4), ("gaussian", 4), ("pissa", 8), ("orthogonal", 8)])
def test_the_setting_decides_the_start(init: str, rank: int, tiny_base: Path, images: Path, tmp_path: Path) -> None:
    plan = plan_config(config_for(tiny_base, images, tmp_path / "x.safetensors", f"lora.init={init}"))
    changes = new_adapter(opened(tiny_base), plan.config).changes()
    assert {change.rank for change in changes.values()} == {rank}
    assert {change.alpha for change in changes.values()} == {8.0 * rank / 4}
    assert all(change.norm() == 0 for change in changes.values())


def test_the_gaussian_start_is_spread_as_pefts() -> None:
    linear = nn.Linear(2000, 4)
    start = TrainableLowRank(module=linear, rank=RANK, alpha=ALPHA, gaussian=True).start("unet.0", seed=0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights="gaussian")
    theirs = get_peft_model(nn.Sequential(linear), config).get_submodule("base_model.model.0.lora_A.default").weight
    assert list(start) == ["down"]
    assert start["down"].shape == theirs.shape
    assert start["down"].std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert start["down"].mean().abs() < 0.02
