"""What is left out of an adapter at random: the same as in kohya's trainer and LyCORIS, and a function of (seed, step)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlora.base.conditioning import Conditioning
from sdlora.errors import ConfigError
from sdlora.lora.adapter import Adapter
from sdlora.lora.dropout import AdapterDropout, DropoutRates, ModuleDropout
from sdlora.lora.new_trainable import KindSettings, trainable_for
from sdlora.lora.relative_trainable import TrainableRelative
from sdlora.training.batches import dropout_keys
from sdlora.training.session import TrainingSession
from tests.training_runs import config_for, losses, session_for

RANK, ALPHA, NAME = 3, 1.5, "x.layer"
KEYS = torch.tensor([[2**62 + 5, 77], [3, 77]])
MODULES = {"linear": lambda: nn.Linear(24, 16), "convolution": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1)}
RATES = (
    DropoutRates(values=0.3, ranks=0.4, modules=0.2),
    DropoutRates(values=0.4),
    DropoutRates(ranks=0.4),
    DropoutRates(modules=0.9),
)
CASES = [
    (kind, made, rates)
    for kind in ("lora", "dora", "loha", "lokr", "pissa")
    for made in MODULES
    for rates in RATES
    if (kind, made) != ("pissa", "convolution") and not (kind in ("loha", "lokr") and rates == RATES[1])
]


def splitmix(value: int) -> int:
    """Steele et al. 2014, figure 17, in Python's whole numbers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def kept(key: int, count: int, rate: float, use: int, name: str = NAME) -> list[bool]:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little") + use
    start = splitmix(key ^ number)
    draws = [splitmix((start + place * 0x9E3779B97F4A7C15) % 2**64) >> 40 for place in range(1, count + 1)]
    return [draw >= round(rate * 2**24) for draw in draws]


def test_masks_are_those_of_splitmix_and_have_the_stated_share() -> None:
    dropout = AdapterDropout(DropoutRates(ranks=0.25))
    with dropout.drawn_by(KEYS):
        found = ModuleDropout(adapter=dropout, name=NAME).hidden(torch.ones(4, 7, 40_000), channels=-1)
        again = ModuleDropout(adapter=dropout, name=NAME).hidden(torch.ones(4, 7, 40_000), channels=-1)
        other = ModuleDropout(adapter=dropout, name="x.other").hidden(torch.ones(4, 7, 40_000), channels=-1)
    assert torch.equal(found, again)
    assert torch.equal(found, found[:, :1].expand_as(found)), "a rank is left out of every token"
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    mask = found[:, 0] > 0
    for one in (mask[0], mask[2], other[0, 0] > 0):
        assert one.float().mean().item() == pytest.approx(0.75, abs=0.01)
    for one in (mask[1], mask[2], other[0, 0] > 0):
        both = (mask[0] & one).float().mean().item()
        assert both == pytest.approx(0.75**2, abs=0.01), "rows and modules are independent"
    assert mask[2, :50].tolist() == kept(3, 2 * 40_000, 0.25, 2)[:50]
    assert mask[3, :50].tolist() == kept(3, 2 * 40_000, 0.25, 2)[40_000:40_050]


def masks_of(rates: DropoutRates, shape: tuple[int, ...], outputs: int) -> Mapping[str, Tensor]:
    """What is multiplied into the hidden values, ΔW's outputs and the change, by the definition; float64."""
    images, rank = shape[0], RANK
    count = math.prod(shape[1:])
    step = int(KEYS[0, 1])
    values, ranks = torch.ones(shape).double(), torch.ones(images, rank).double()
    for row, key in enumerate(KEYS[:, 0].tolist()):
        values[row] = torch.tensor(kept(key, count, rates.values, 1)).view(shape[1:]).double() / (1 - rates.values)
        ranks[row] = torch.tensor(kept(key, rank, rates.ranks, 2)).double() / (1 - rates.ranks)
    by_rank = ranks.view(images, rank, *[1] * (len(shape) - 2)) if len(shape) == 4 else ranks[:, None]
    return {
        "hidden": values * by_rank,
        "outputs": torch.tensor(kept(step, outputs, rates.ranks, 3)).double(),
        "module": torch.tensor(kept(step, 1, rates.modules, 4)).double(),
    }


def adapter_on(kind: str, module: nn.Module, rates: DropoutRates) -> tuple[Adapter[str], nn.Module]:
    dropout = AdapterDropout(rates)
    if kind == "pissa":
        assert isinstance(module, nn.Linear)
        one = TrainableRelative(
            module=module, rank=RANK, alpha=ALPHA, init="pissa", name=NAME, seed=0, dropout=dropout.of(NAME)
        )
    else:
        settings = KindSettings(kind=kind, dropout=dropout)  # ty: ignore[invalid-argument-type]
        one = trainable_for(NAME, module, settings, rank=RANK, alpha=ALPHA)
    adapter = Adapter({NAME: one}, seed=0, group_of=lambda name, tensor: "x", dropout=dropout)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapter.parameters[0].add_(torch.randn(adapter.parameters[0].shape, generator=drawn) / 5)
    adapter.begin_step()
    return adapter, adapter._layers[NAME]


def expected_output(
    kind: str, module: Any, x: Tensor, t: Mapping[str, Tensor], rates: DropoutRates, start: tuple[Tensor, ...]
) -> Tensor:
    """Written out in float64."""
    weight, convolved = module.weight.detach().double(), isinstance(module, nn.Conv2d)

    def product(values: Tensor, matrix: Tensor) -> Tensor:
        return F.conv2d(values, matrix, None, 2, 1) if convolved else values @ matrix.T

    bias = module.bias.detach().double().view(-1, 1, 1) if convolved else module.bias.detach().double()
    plain = product(x, weight)
    hidden = (x.shape[0], RANK, *plain.shape[2:]) if convolved else (*x.shape[:2], RANK)
    masks = masks_of(rates, hidden, plain.shape[1] if convolved else plain.shape[2])
    if kind in ("loha", "lokr"):
        scale = 1.0 if "w2" in t else ALPHA / RANK
        if kind == "loha":
            delta = ((t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])).reshape(weight.shape)
        else:
            second = t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"]
            delta = torch.kron(t["w1"][:, :, None, None] if second.ndim == 4 else t["w1"], second)
        delta = delta * masks["outputs"].view(-1, *[1] * (weight.ndim - 1))
        return plain + bias + product(x, delta) * scale * masks["module"]

    def through(down: Tensor, up: Tensor) -> Tensor:
        return raised(product(x, down) * masks["hidden"], up) * (ALPHA / RANK)

    def raised(values: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(values, up) if convolved else values @ up.T

    if kind == "pissa":
        down0, up0 = start
        change = through(t["down"] + down0, t["up"] + up0) - through(down0, up0)
        return plain + bias + change * masks["module"]
    change = through(t["down"], t["up"])
    if kind == "dora":
        whole = weight + (t["up"].flatten(1) @ t["down"].flatten(1)).view(weight.shape) * (ALPHA / RANK)
        axes = tuple(range(1, weight.ndim))
        factor = (weight.square().sum(axes).sqrt() + t["magnitude"]) / whole.detach().square().sum(axes).sqrt()
        change = (plain + change) * (factor.view(-1, 1, 1) if convolved else factor) - plain
    return plain + bias + change * masks["module"]


@pytest.mark.parametrize(("kind", "made", "rates"), CASES)
def test_outputs_and_gradients_are_those_of_the_formula(kind: str, made: str, rates: DropoutRates) -> None:
    torch.manual_seed(0)
    module = MODULES[made]().requires_grad_(False)
    x = torch.randn((2, 5, 24) if made == "linear" else (2, 8, 6, 6))
    adapter, layer = adapter_on(kind, module, rates)
    ours = x.clone().requires_grad_()
    with adapter.dropout.drawn_by(KEYS):
        y = layer(ours)
        gradient = torch.randn(y.shape)
        y.backward(gradient)
    adapter.end_backward()
    leaves = {n: tensor.double().requires_grad_() for n, tensor in adapter._masters[NAME].items()}
    start = tuple(t.double() for t in getattr(adapter._trainables[NAME], "_factors", ()))
    wide = x.double().requires_grad_()
    expected = expected_output(kind, module, wide, leaves, rates, start)
    expected.backward(gradient.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.grad, wide.grad.float(), rtol=1e-4, atol=1e-5)  # ty: ignore[unresolved-attribute]
    position, (master,) = 0, adapter.parameters
    for leaf in leaves.values():
        found = master.grad[position : position + leaf.numel()].view(leaf.shape)  # ty: ignore[not-subscriptable]
        torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-4, atol=1e-4)
        position += leaf.numel()
    pristine = adapter_on(kind, module, DropoutRates())[1]
    torch.testing.assert_close(layer(x), pristine(x), rtol=1e-5, atol=1e-5)
    assert (y.detach() - pristine(x)).abs().max() > 1e-3, "something was left out"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", MODULES)
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_ranks_are_left_out_as_in_lycoris(kind: str, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    torch.manual_seed(0)
    module = MODULES[made]().requires_grad_(False)
    x = torch.randn((2, 5, 24) if made == "linear" else (2, 8, 6, 6))
    adapter, layer = adapter_on(kind, module, DropoutRates(ranks=0.5))
    with adapter.dropout.drawn_by(KEYS):
        ours = layer(x)
    theirs = {"loha": LohaModule, "lokr": LokrModule}[kind](
        "x", module, multiplier=1.0, lora_dim=RANK, alpha=ALPHA, rank_dropout=0.5
    )
    prefix, leaves = {"loha": "hada_", "lokr": "lokr_"}[kind], dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter._masters[NAME].items():
            leaves[f"{prefix}{name}"].copy_(tensor.reshape(leaves[f"{prefix}{name}"].shape))

    def drawn(count: int, **_: Any) -> Tensor:
        return torch.tensor(kept(int(KEYS[0, 1]), count, 0.5, 3)).float()

    theirs.train()
    theirs.apply_to()
    monkeypatch.setattr(torch, "rand", drawn)
    torch.testing.assert_close(ours, module(x), rtol=1e-4, atol=1e-5)


SETTINGS = ("lora.dropout=0.4", "lora.rank_dropout=0.4", "lora.module_dropout=0.4")


def gradients(session: TrainingSession, step: int) -> Tensor:
    """Those of ``step``, where every tensor differs from zero."""
    drawn = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in session.adapter.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=drawn) / 10)
    losses(session, step)
    prepared = session._ahead.take(step)
    with session.attached():
        session.adapter.begin_step()
        for inputs in prepared.parts(session.base.device, session.shape.micro_batch):
            with session.adapter.dropout.drawn_by(inputs.dropout_keys):
                session._backward(inputs, batch_size=prepared.batch_size)
            session.adapter.end_backward()
    return torch.cat([parameter.grad.flatten() for parameter in session.adapter.parameters])  # ty: ignore


def test_what_is_left_out_depends_on_seed_and_step_alone(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    def found(*more: str) -> Tensor:
        output = tmp_path / "x.safetensors"
        return gradients(session_for(tiny_base, images, output, "train.batch_size=4", *SETTINGS, *more), 1)

    once = found()
    for shape in ("train.micro_batch=1", "train.gradient_checkpointing=true"):
        other = found(shape)
        assert (once - other).norm() < 1e-4 * once.norm(), shape
    assert (once - found("train.seed=1")).norm() > 0.1 * once.norm()


def test_keys_are_another_in_each_step_and_image_and_one_in_a_step() -> None:
    keys = dropout_keys(seed=1, step=2, slots=range(4))
    assert len(set(keys[:, 0].tolist())) == 4
    assert len(set(keys[:, 1].tolist())) == 1
    assert dropout_keys(seed=1, step=2, slots=[1, 3]).tolist() == keys[1::2].tolist(), "whatever process has them"
    for other in (dropout_keys(seed=1, step=3, slots=range(4)), dropout_keys(seed=2, step=2, slots=range(4))):
        assert not set(other.flatten().tolist()) & set(keys.flatten().tolist())


def test_nothing_is_left_out_of_samples_and_validation(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    session = session_for(tiny_base, images, tmp_path / "x.safetensors", *SETTINGS)
    plain = session_for(tiny_base, images, tmp_path / "x.safetensors")
    drawn = torch.Generator().manual_seed(4)
    outputs = []
    for each in (session, plain):
        with torch.no_grad(), each.attached():
            drawn.manual_seed(4)
            for parameter in each.adapter.parameters:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) / 10)
            each.adapter.begin_step()
            noisy = torch.ones(1, 4, 8, 8)
            context = torch.ones(1, 77, 32)
            conditioning = Conditioning(context=context, pooled=None)
            outputs.append(each.base.predict(noisy, torch.tensor(500), conditioning, torch.zeros(1, 6)))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("lora.kind=loha", "lora.dropout=0.1"), "lora.dropout: not for the kind loha"),
        (("lora.kind=lokr", "lora.dropout=0.1"), "lora.dropout: not for the kind lokr"),
        (("lora.init=pissa", "lora.max_norm=1"), 'lora.max_norm: not with init = "pissa"'),
        (("lora.rank_dropout=1",), "lora.rank_dropout = 1: must be less than 1"),
        (("lora.max_norm=0",), "lora.max_norm = 0: must be more than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config_for(tmp_path, tmp_path, tmp_path / "x.safetensors", *settings)
    assert said in str(caught.value)
