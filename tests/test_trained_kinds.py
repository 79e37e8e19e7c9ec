"""Layers of every kind against float64 autograd, peft and lycoris-lora; their files, settings and runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlora.errors import ConfigError, Interrupted
from sdlora.formats.lora_file import read_lora
from sdlora.formats.safetensors_file import read_header
from sdlora.lora.adapter import Adapter
from sdlora.lora.kronecker_trainable import divided
from sdlora.lora.new_trainable import KindSettings, trainable_for
from sdlora.training.module_choice import choose_modules
from sdlora.training.plan import plan_config
from tests.training_runs import config_for

RANK, ALPHA = 3, 1.5
KINDS = ("lora", "dora", "loha", "lokr", "lokr whole")


def linear() -> nn.Linear:
    return nn.Linear(24, 16)


def convolution() -> nn.Conv2d:
    return nn.Conv2d(8, 12, 3, stride=2, padding=1)


MODULES = {"linear": linear, "convolution": convolution}


def adapter_on(kind: str, module: nn.Module) -> tuple[Adapter[str], nn.Module, dict[str, nn.Module]]:
    """An adapter of ``module`` with random tensors, its layer in place."""
    parent = nn.ModuleDict({"layer": module.requires_grad_(False)})
    modules = {"x": parent, "x.layer": module}
    settings = KindSettings(kind=kind.split()[0])  # ty: ignore[invalid-argument-type]
    rank = 64 if kind.endswith("whole") else RANK
    trainable = trainable_for("x.layer", module, settings, rank=rank, alpha=ALPHA)
    adapter = Adapter({"x.layer": trainable}, seed=0, group_of=lambda name, tensor: "x")
    (change,) = adapter.changes().values()
    assert change.delta(weight_of(module)).abs().max() < 1e-6, "the change is zero at the start"
    with torch.no_grad():
        drawn = torch.Generator().manual_seed(1)
        adapter.parameters[0].add_(torch.randn(adapter.parameters[0].shape, generator=drawn) / 5)
    adapter.attach(modules)
    adapter.begin_step()
    return adapter, parent["layer"], modules


def weight_of(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.detach().clone()


def inputs(module: nn.Module) -> Tensor:
    drawn = torch.Generator().manual_seed(2)
    return torch.randn((2, 5, 24) if isinstance(module, nn.Linear) else (2, 8, 6, 6), generator=drawn)


def formula(kind: str, module: nn.Module, tensors: Mapping[str, Tensor], rank: int) -> Tensor:
    """The changed weight in float64, written out from the papers."""
    weight = weight_of(module).double()
    t = tensors
    if kind in ("lora", "dora"):
        change = (t["up"].flatten(1) @ t["down"].flatten(1)).reshape(weight.shape) * ALPHA / rank
        if kind == "lora":
            return weight + change
        axes = tuple(range(1, weight.ndim))
        lengths = weight.pow(2).sum(axes, keepdim=True).sqrt()
        changed = weight + change
        magnitude = lengths + t["magnitude"].reshape(lengths.shape)
        return magnitude * changed / changed.pow(2).sum(axes, keepdim=True).sqrt().detach()
    if kind == "loha":
        product = (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
        return weight + product.reshape(weight.shape) * ALPHA / rank
    second = t["w2"].flatten(1) if "w2" in t else t["w2_a"] @ t["w2_b"]
    scale = 1.0 if "w2" in t else ALPHA / rank
    c = t["w1"].shape[1]
    b, d = second.shape[0], weight.shape[1] // c
    kernel = math.prod(weight.shape[2:])
    factors = second.reshape(b, d, kernel)
    return weight + scale * torch.einsum("ac,bdk->abcdk", t["w1"], factors).reshape(weight.shape)


@pytest.mark.parametrize("made", MODULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_formula(kind: str, made: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = MODULES[made]().to(dtype)
    x = inputs(module).to(dtype)
    adapter, layer, _ = adapter_on(kind, module)
    ours = x.clone().requires_grad_()
    y = layer(ours)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    y.backward(gradient)
    adapter.end_backward()

    rank = 64 if kind.endswith("whole") else RANK
    leaves = {n: t.detach().to(dtype).double().requires_grad_() for n, t in adapter._masters["x.layer"].items()}
    weight = formula(kind.split()[0], module, leaves, rank)
    wide = x.double().requires_grad_()
    bias = None if module.bias is None else module.bias.double()
    if isinstance(module, nn.Linear):
        expected = F.linear(wide, weight, bias)
    else:
        expected = F.conv2d(wide, weight, bias, module.stride, module.padding)
    expected.backward(gradient.double())
    assert wide.grad is not None
    assert ours.grad is not None
    bound = 2e-5 if dtype == torch.float32 else 0.03

    def close(found: Tensor, exact: Tensor, what: str) -> None:
        assert (found.double() - exact).norm() <= bound * exact.norm(), what

    close(y.detach(), expected.detach(), "output")
    close(ours.grad, wide.grad, "gradient of the input")
    position, (master,) = 0, adapter.parameters
    assert master.grad is not None
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        close(master.grad[position : position + leaf.numel()].view(leaf.shape), leaf.grad, name)
        position += leaf.numel()
    if dtype == torch.float32:
        (change,) = adapter.changes().values()
        merged = weight_of(module).double() + change.delta(weight_of(module).double())
        close(merged.float(), weight.detach(), "what the file does")


def stepped(adapter: Adapter[str], layer: nn.Module, x: Tensor, target: Tensor) -> None:
    """One step of plain gradient descent on a mean squared error."""
    adapter.begin_step()
    (layer(x) - target).square().mean().backward()
    adapter.end_backward()
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("dora", [False, True])
def test_a_step_is_that_of_peft(dora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    module = linear()
    config = LoraConfig(r=RANK, lora_alpha=2, target_modules=["0"], use_dora=dora)
    theirs: Any = get_peft_model(nn.Sequential(nn.Linear(24, 16)), config)
    peft_layer = theirs.base_model.model[0]
    peft_layer.base_layer.load_state_dict(module.state_dict())
    settings = KindSettings(kind="dora" if dora else "lora")
    module.requires_grad_(False)
    adapter = Adapter(
        {"x": trainable_for("x", module, settings, rank=RANK, alpha=2.0)}, seed=0, group_of=lambda name, tensor: "x"
    )
    layer = adapter._layers["x"]
    with torch.no_grad():
        for master in adapter._masters["x"].values():
            master.add_(torch.randn(master.shape) / 5)
        peft_layer.lora_A["default"].weight.copy_(adapter._masters["x"]["down"])
        peft_layer.lora_B["default"].weight.copy_(adapter._masters["x"]["up"])
        if dora:
            lengths = module.weight.norm(dim=1)
            peft_layer.lora_magnitude_vector["default"].weight.copy_(lengths + adapter._masters["x"]["magnitude"])
    x, target = torch.randn(7, 24), torch.randn(7, 16)
    stepped(adapter, layer, x, target)
    trained = [each for each in theirs.parameters() if each.requires_grad]
    (theirs(x) - target).square().mean().backward()
    with torch.no_grad():
        for parameter in trained:
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(adapter._masters["x"]["down"], peft_layer.lora_A["default"].weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(adapter._masters["x"]["up"], peft_layer.lora_B["default"].weight, rtol=0, atol=1e-6)
    if dora:
        magnitude = module.weight.norm(dim=1) + adapter._masters["x"]["magnitude"]
        torch.testing.assert_close(magnitude, peft_layer.lora_magnitude_vector["default"].weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dora_trains_the_others_where_the_weights_of_an_output_are_all_zero(dtype: torch.dtype) -> None:
    """As in layers that a checkpoint starts at zero: their length is zero, and it divides."""
    module = linear().requires_grad_(False).to(dtype)
    module.weight[3] = 0
    trainable = trainable_for("x", module, KindSettings(kind="dora"), rank=RANK, alpha=2.0)
    adapter = Adapter({"x": trainable}, seed=0, group_of=lambda name, tensor: "x")
    x, target = torch.randn(7, 24, dtype=dtype), torch.randn(7, 16, dtype=dtype)
    adapter.begin_step()
    torch.testing.assert_close(adapter._layers["x"](x), module(x))
    for _ in range(3):
        stepped(adapter, adapter._layers["x"], x, target)
    assert adapter.parameters[0].isfinite().all()
    adapter.begin_step()
    weight = module.weight.double()
    delta = adapter.changes()["x"].delta(weight)
    assert delta.any(1).tolist() == [row != 3 for row in range(16)], "with a length of zero, and no way to another"
    expected = x.double() @ (weight + delta).T + module.bias.double()
    torch.testing.assert_close(adapter._layers["x"](x).double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", MODULES)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_step_is_that_of_lycoris(kind: str, made: str) -> None:
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    torch.manual_seed(0)
    module = MODULES[made]()
    theirs = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}[kind](
        "x", module, multiplier=1.0, lora_dim=RANK, alpha=ALPHA
    )
    adapter, layer, _ = adapter_on(kind, module)
    masters = adapter._masters["x.layer"]
    names = {
        "lora": {"down": "lora_down.weight", "up": "lora_up.weight"},
        "loha": {name: f"hada_{name}" for name in masters},
        "lokr": {name: f"lokr_{name}" for name in masters},
    }[kind]
    leaves = dict(theirs.named_parameters())
    with torch.no_grad():
        for ours, name in names.items():
            leaves[name].copy_(masters[ours].reshape(leaves[name].shape))
    x = inputs(module)
    target = torch.randn(layer(x).shape)
    stepped(adapter, layer, x, target)
    theirs.apply_to()
    (module(x) - target).square().mean().backward()
    for ours, name in names.items():
        gradient = leaves[name].grad
        assert gradient is not None
        expected = (leaves[name] - 0.1 * gradient).detach()
        torch.testing.assert_close(masters[ours], expected.reshape(masters[ours].shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(12, -1, (3, 4)), (12, 2, (2, 6)), (13, -1, (1, 13)), (320, 8, (8, 40)), (10, 4, (2, 5))],
)
def test_the_factors_of_lokr_are_those_of_lycoris(size: int, factor: int, expected: tuple[int, int]) -> None:
    from lycoris.functional.general import factorization

    assert divided(size, factor) == expected == factorization(size, factor)


RUNS = {
    "lora.kind=locon": ("lora.conv_rank=2", "lora.conv_alpha=1"),
    "lora.kind=dora": (),
    "lora.kind=loha": (),
    "lora.kind=lokr": ("lora.factor=4",),
    "lora.targets=all": ("lora.rslora=true",),
}


@pytest.mark.parametrize("setting", RUNS)
def test_a_run_of_every_kind_resumes_to_the_same_file(
    setting: str, tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    import threading

    import sdlora as package
    from sdlora.progress import CallbackProgress

    def config(output: Path) -> Any:
        more = ("train.steps=11", "train.save_every=5", "lora.rank=3", "output.precision=float32", "samples.prompts=[]")
        return config_for(tiny_base, images, output, setting, *RUNS[setting], *more)

    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    package.train(config(whole))
    stop = threading.Event()
    progress = CallbackProgress(lambda update: stop.set() if update.task == "Training" and update.done else None)
    with pytest.raises(Interrupted):
        package.train(config(parts), stop=stop, progress=progress)
    package.train(config(parts))
    one, other = read_lora(whole), read_lora(parts)
    assert not one.problems
    for name, change in one.modules.items():
        for key, tensor in change.tensors().items():
            assert torch.equal(tensor, other.modules[name].tensors()[key]), name
    described = read_header(whole, ConfigError).metadata
    assert described["ss_network_module"] == (
        "networks.lora" if setting.endswith(("locon", "all")) else "lycoris.kohya"
    )
    kind = {"locon": "lora", "all": "lora"}.get(setting.partition("=")[2], setting.partition("=")[2])
    assert set(one.kinds) == {kind}
    if setting.endswith("locon"):
        convolutions = {change.rank for change in one.modules.values() if (change.weight_shape or ())[2:] == (3, 3)}
        assert convolutions == {2}
    drawn = package.generate("a fox", base=tiny_base, loras=[whole], seed=1, steps=1)[0]
    alone = package.generate("a fox", base=tiny_base, seed=1, steps=1)[0]
    assert not torch.equal(drawn.latents, alone.latents)


def test_rslora_gives_readers_the_scale(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    def alphas(*more: str) -> set[float]:
        plan = plan_config(
            config_for(tiny_base, images, tmp_path / "x.safetensors", "lora.rank=9", "lora.alpha=3", *more)
        )
        return {choice.alpha for choice in choose_modules(plan.base, plan.config).values()}

    assert alphas() == {3.0}
    assert alphas("lora.rslora=true") == {9.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("lora.kind=lokr", "lora.init=pissa"), "only for the kinds lora and locon, not for lokr"),
        (("lora.kind=dora", "lora.start_from=x.safetensors"), "lora.start_from: only for the kinds lora and locon"),
        (("lora.factor=4",), "lora.factor = 4: only for the kind lokr, not for lora"),
        (("lora.kind=lokr", "lora.factor=0"), "lora.factor = 0: must be -1, or at least 1"),
        (("lora.kind=lycoris",), "lora.kind"),
    ],
)
def test_settings_that_do_not_fit_are_said(settings: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config_for(tmp_path, tmp_path, tmp_path / "x.safetensors", *settings)
    assert said in str(caught.value)
