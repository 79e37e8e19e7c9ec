"""The layer that trains, in its fast form and in autograd's own, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdlora.lora.adapter import Adapter
from sdlora.lora.layers import LoraLinear
from sdlora.lora.low_rank_trainable import TrainableLowRank
from sdlora.lora.targets import choose_targets

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def layer_and_inputs(
    dtype: torch.dtype, *, fast: bool, bias: bool = True
) -> tuple[LoraLinear, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A layer, x, the gradient of y, and the tensors that the layer adds gradients to."""
    draw = torch.Generator().manual_seed(1)
    base = nn.Linear(24, 40, bias=bias)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 5)
    base = base.to(dtype).requires_grad_(False)
    down, up = (torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in ((3, 24), (40, 3)))
    gradients = (torch.zeros_like(down), torch.zeros_like(up))
    layer = LoraLinear(base, down, up, 0.7, gradients=gradients if fast else None)
    x, grad_y = (torch.randn(2, 5, width, generator=draw).to(dtype) for width in (24, 40))
    return layer, x.requires_grad_(), grad_y, gradients


def exact(layer: LoraLinear, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and the gradients of x, down and up, by the formula in float64."""
    weight = layer.base.weight.double()
    bias = layer.base.bias.double() if layer.base.bias is not None else 0
    x64, down, up = (t.detach().double().requires_grad_() for t in (x, layer.down, layer.up))
    y = x64 @ (weight + layer.scale * up @ down).T + bias
    return (y, *torch.autograd.grad(y, (x64, down, up), grad_y.double()))


def assert_close(ours: Tensor | None, reference: Tensor, dtype: torch.dtype) -> None:
    assert ours is not None
    assert (ours.double() - reference).norm() <= ROUNDING[dtype] * reference.norm()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bias", [True, False])
def test_both_forms_equal_the_formula_in_every_dtype(dtype: torch.dtype, bias: bool) -> None:
    for fast in (True, False):
        layer, x, grad_y, gradients = layer_and_inputs(dtype, fast=fast, bias=bias)
        y = layer(x)
        y.backward(grad_y)
        found = (y, x.grad, *(gradients if fast else (layer.down.grad, layer.up.grad)))
        for ours, reference in zip(found, exact(layer, x, grad_y), strict=True):
            assert_close(ours, reference, dtype)


def test_the_plain_form_of_a_fast_layer_adds_to_the_same_gradients() -> None:
    results = []
    for plain in (False, True):
        layer, x, grad_y, gradients = layer_and_inputs(torch.float32, fast=True)
        y = layer.plain(x) if plain else layer(x)
        y.backward(grad_y)
        results.append((y, x.grad, *gradients))
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, torch.float32)


def test_gradients_of_several_passes_add_up() -> None:
    layer, x, grad_y, gradients = layer_and_inputs(torch.float64, fast=True)
    for _ in range(3):
        layer(x).backward(grad_y)
    _, _, *references = exact(layer, x, grad_y)
    for ours, reference in zip(gradients, references, strict=True):
        assert_close(ours, 3 * reference, torch.float64)


@pytest.mark.parametrize("frozen", ["x", "down", "up"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    layer, x, grad_y, gradients = layer_and_inputs(torch.float64, fast=True)
    {"x": x, "down": layer.down, "up": layer.up}[frozen].requires_grad_(False)
    layer(x).backward(grad_y)
    _, *references = exact(layer, x, grad_y)
    for name, ours, reference in zip(("x", "down", "up"), (x.grad, *gradients), references, strict=True):
        if name != frozen:
            assert_close(ours, reference, torch.float64)
        else:
            assert ours is None or not ours.any()


@pytest.mark.parametrize("moment", ["before the forward pass", "between the passes"])
def test_gradients_arrive_whatever_happens_to_grad(moment: str) -> None:
    layer, x, grad_y, gradients = layer_and_inputs(torch.float64, fast=True)
    for leaf in (layer.down, layer.up):
        leaf.grad = torch.ones_like(leaf) if moment == "between the passes" else None
    y = layer(x)
    layer.down.grad = layer.up.grad = None
    y.backward(grad_y)
    _, _, *references = exact(layer, x, grad_y)
    for ours, reference in zip(gradients, references, strict=True):
        assert_close(ours, reference, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_arrive_in_masters_whose_grad_was_set_to_none(dtype: torch.dtype) -> None:
    block = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(6, 6, dtype=dtype)})}).requires_grad_(False)
    modules = {f"unet.{name}": module for name, module in block.named_modules() if name}
    targets = choose_targets(modules, "attention")
    trainables = {name: TrainableLowRank(module=module, rank=2, alpha=2.0) for name, module in targets.items()}
    adapter = Adapter(trainables, seed=0, group_of=lambda name, tensor: "unet")
    adapter.attach(modules)
    (master,) = adapter.parameters
    for parameter in adapter.parameters:
        parameter.data.fill_(0.5)
    found = []
    for cleared in (False, True):
        adapter.begin_step()
        if cleared:
            torch.optim.SGD(adapter.parameters, lr=1.0).zero_grad(set_to_none=True)
        block["attn"]["to_q"](torch.ones(3, 6, dtype=dtype)).float().sum().backward()
        adapter.end_backward()
        assert master.grad is not None
        found.append(master.grad.clone())
    assert found[0].any()
    assert torch.equal(*found)


def test_a_second_derivative_is_refused() -> None:
    layer, x, grad_y, _ = layer_and_inputs(torch.float64, fast=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(layer(x), x, grad_y, create_graph=True)
    (grad_x,) = torch.autograd.grad(layer.plain(x), x, grad_y, create_graph=True)
    (second,) = torch.autograd.grad(grad_x.sum(), layer.up)
    assert second.any()


def test_compiled_whole_it_gives_the_same_gradients() -> None:
    layer, x, grad_y, gradients = layer_and_inputs(torch.float64, fast=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.backward(grad_y)
    found = (y, x.grad, *gradients)
    for ours, reference in zip(found, exact(layer, x, grad_y), strict=True):
        assert_close(ours, reference, torch.float64)
    assert layer.down.grad is None
