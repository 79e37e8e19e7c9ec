"""Every kind of change against lycoris-lora's forward (its merge is wrong for some) and against formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import load_file, save_file
from torch import nn

from sdlora.formats.lora_file import read_lora
from sdlora.lora.kinds import Decomposed, Full, Hadamard, Kronecker
from sdlora.lora.low_rank import LowRank
from sdlora.lora.stack import temporarily_applied

LINEAR, CONV, POINT = (
    (lambda: nn.Linear(24, 16)),
    (lambda: nn.Conv2d(8, 16, 3, padding=1)),
    (lambda: nn.Conv2d(8, 16, 1)),
)
KEY = "lora_unet_x"
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "locon linear": (LoConModule, LINEAR, {"lora_dim": 4, "alpha": 2}),
    "locon conv": (LoConModule, CONV, {"lora_dim": 4, "alpha": 2}),
    "locon 1x1": (LoConModule, POINT, {"lora_dim": 4, "alpha": 2}),
    "locon tucker": (LoConModule, CONV, {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "locon rs": (LoConModule, LINEAR, {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
    "dora by output": (
        LoConModule,
        LINEAR,
        {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_output": True},
    ),
    "dora by input": (
        LoConModule,
        LINEAR,
        {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_output": False},
    ),
    "dora conv": (LoConModule, CONV, {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_output": True}),
    "dora conv by input": (
        LoConModule,
        CONV,
        {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_output": False},
    ),
    "loha linear": (LohaModule, LINEAR, {"lora_dim": 4, "alpha": 2}),
    "loha conv": (LohaModule, CONV, {"lora_dim": 4, "alpha": 2}),
    "loha tucker": (LohaModule, CONV, {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "loha dora": (LohaModule, LINEAR, {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    "lokr full first": (LokrModule, LINEAR, {"lora_dim": 2, "alpha": 1, "factor": 4}),
    "lokr both products": (LokrModule, LINEAR, {"lora_dim": 1, "alpha": 0.5, "factor": 4, "decompose_both": True}),
    "lokr full": (LokrModule, LINEAR, {"lora_dim": 100000, "alpha": 3, "factor": 4}),
    "lokr conv": (LokrModule, CONV, {"lora_dim": 2, "alpha": 1, "factor": 2}),
    "lokr tucker": (LokrModule, CONV, {"lora_dim": 2, "alpha": 1, "factor": 2, "use_tucker": True}),
    "ia3 output": (IA3Module, LINEAR, {}),
    "ia3 input": (IA3Module, LINEAR, {"train_on_input": True}),
    "ia3 conv": (IA3Module, CONV, {}),
    "glora linear": (GLoRAModule, LINEAR, {"lora_dim": 4, "alpha": 2}),
    "glora conv": (GLoRAModule, CONV, {"lora_dim": 4, "alpha": 2}),
    "oft linear": (DiagOFTModule, LINEAR, {"lora_dim": 4}),
    "oft rescaled": (DiagOFTModule, CONV, {"lora_dim": 4, "rescaled": True}),
    "oft constrained": (DiagOFTModule, LINEAR, {"lora_dim": 4, "constraint": 0.01}),
    "boft linear": (ButterflyOFTModule, LINEAR, {"lora_dim": 4}),
    "boft conv rescaled": (ButterflyOFTModule, CONV, {"lora_dim": 4, "rescaled": True}),
    "full": (FullModule, LINEAR, {}),
    "norm": (NormModule, lambda: nn.LayerNorm(16), {}),
}


def written(module: Any, file: Path) -> Path:
    state = module.custom_state_dict() or module.state_dict()
    tensors = {f"{KEY}.{name}": t.detach().clone().contiguous() for name, t in state.items() if "org_" not in name}
    save_file(tensors, file)
    return file


@torch.no_grad()
def random_module(kind: Any, layer: nn.Module, options: dict[str, Any]) -> Any:
    module = kind("x", layer, 1.0, **options)
    if kind is FullModule:
        # Only in place does it hold a whole weight, from which it computes the difference.
        module.apply_to()
    for name, parameter in module.named_parameters():
        if "org_module" not in name and "scalar" not in name:
            parameter += 0.3 * torch.randn_like(parameter)
    return module.eval()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_change_is_that_of_lycoris_forward(case: str, tmp_path: Path) -> None:
    kind, make, options = CASES[case]
    layer = make()
    if isinstance(layer, nn.Linear):
        x = torch.randn(5, 24)
    else:
        x = torch.randn(2, 8, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(3, 16)
    before = layer(x)
    module = random_module(kind, layer, options)
    expected = module(x)
    if kind is FullModule:
        module.restore()
    file = read_lora(written(module, tmp_path / "x.safetensors"))
    assert list(file.modules) == [KEY]
    assert not file.problems
    shape = tuple(layer.weight.shape)
    assert file.modules[KEY].fits(shape)
    more_outputs, more_inputs = (shape[0] + 2, *shape[1:]), (shape[0], *[size + 3 for size in shape[1:2]], *shape[2:])
    # A scaling of inputs knows nothing of outputs; a scaling or rotation of outputs knows nothing of inputs.
    assert file.modules[KEY].fits(more_outputs) is (case == "ia3 input")
    assert file.modules[KEY].fits(more_inputs) is (
        more_inputs == shape or (file.modules[KEY].kind in ("oft", "ia3") and case != "ia3 input")
    )
    stored = set(load_file(tmp_path / "x.safetensors")) - {f"{KEY}.alpha"}
    assert {f"{KEY}.{name}" for name in file.modules[KEY].tensors()} == stored
    with temporarily_applied({"x": layer}, [{"x": (file.modules[KEY], 1.0)}]):
        ours = layer(x)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(x), before)


def test_formulas_in_float64() -> None:
    weight = torch.randn(6, 8, 3, 3, dtype=torch.float64)
    down, up, mid = torch.randn(2, 8, 1, 1), torch.randn(6, 2, 1, 1), torch.randn(2, 2, 3, 3)
    tucker = torch.zeros(6, 8, 3, 3, dtype=torch.float64)
    for m in range(2):
        for n in range(2):
            outer = up[:, m, 0, 0].double()[:, None] * down[n, :, 0, 0].double()
            tucker += outer[:, :, None, None] * mid[m, n].double()
    change = LowRank(down=down, up=up, mid=mid, alpha=3.0)
    torch.testing.assert_close(change.delta(weight), tucker * 1.5, rtol=1e-6, atol=1e-9)
    assert change.weight_shape == (6, 8, 3, 3)
    assert change.norm() == pytest.approx(float((tucker * 1.5).norm()), rel=1e-4)

    plain = torch.randn(6, 8, dtype=torch.float64)
    a, b, c, d = torch.randn(6, 2), torch.randn(2, 8), torch.randn(6, 2), torch.randn(2, 8)
    loha = Hadamard(w1_a=a, w1_b=b, w2_a=c, w2_b=d, alpha=4.0)
    product = (a.double() @ b.double()) * (c.double() @ d.double()) * 2
    torch.testing.assert_close(loha.delta(plain), product, rtol=1e-6, atol=1e-9)
    assert loha.norm() == pytest.approx(float(product.norm()), rel=1e-4)

    w1, w2_a, w2_b = torch.randn(2, 4), torch.randn(3, 1), torch.randn(1, 2)
    lokr = Kronecker(w1=w1, w2_a=w2_a, w2_b=w2_b, alpha=0.5)
    kron = torch.kron(w1.double(), w2_a.double() @ w2_b.double()) * 0.5
    torch.testing.assert_close(lokr.delta(plain), kron, rtol=1e-6, atol=1e-9)
    assert lokr.norm() == pytest.approx(float(kron.norm()), rel=1e-4)

    dora = Decomposed(inner=loha, magnitude=torch.rand(6, 1) + 0.5)
    changed = plain + product
    expected = dora.magnitude.double() * changed / changed.norm(dim=1, keepdim=True) - plain
    torch.testing.assert_close(dora.delta(plain), expected, rtol=1e-6, atol=1e-9)
    assert dora.norm() is None


@torch.no_grad()
def test_stacking_does_not_depend_on_the_order_and_leaves_no_trace() -> None:
    layer = nn.Linear(8, 6, bias=False)
    pristine = layer.weight.clone()
    dora = Decomposed(
        inner=LowRank(down=torch.randn(2, 8), up=torch.randn(6, 2), alpha=1.0), magnitude=torch.rand(6, 1) + 0.5
    )
    full = Full(diff=torch.randn(6, 8), bias=torch.randn(6))
    results = []
    for order in ((dora, full), (full, dora)):
        with temporarily_applied({"x": layer}, [{"x": (change, 0.7)} for change in order]):
            results.append((layer.weight.clone(), layer.bias.clone()))
        assert torch.equal(layer.weight, pristine)
        assert layer.bias is None
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(results[0][1], 0.7 * full.bias)


def test_a_strength_goes_linearly_from_none_to_all() -> None:
    layer = nn.Linear(8, 6)
    change = LowRank(down=torch.randn(2, 8), up=torch.randn(6, 2), alpha=1.0)
    dora = Decomposed(inner=change, magnitude=torch.rand(6, 1) + 0.5)
    pristine = layer.weight.detach().clone()
    moved = {}
    for strength in (0.5, 1.0):
        with temporarily_applied({"x": layer}, [{"x": (dora, strength)}]):
            moved[strength] = layer.weight.detach() - pristine
    torch.testing.assert_close(moved[0.5] * 2, moved[1.0], rtol=1e-4, atol=1e-5)
