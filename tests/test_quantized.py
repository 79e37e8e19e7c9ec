"""Weights in 8 and 4 bits: their codes against the papers' formulas and bitsandbytes, products against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdlora.base.quantize import quantize_unet
from sdlora.lora import quantized
from sdlora.lora.layers import LoraLinear
from sdlora.lora.quantized import (
    NF4,
    QUANTIZED,
    NF4Linear,
    QuantizedLinear,
    bitsandbytes_works,
    expanded_by_bitsandbytes,
)
from tests.published import UNET_PARAMETERS, published

CPU, META = torch.device("cpu"), torch.device("meta")
ERROR = {"int8": 0.01, "nf4": 0.10}
"""Largest relative error of normal weights: nf4 has .093 in libraries too."""


def linear(out: int = 40, inner: int = 64, *, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    """Weights as of a checkpoint in half precision."""
    layer = nn.Linear(inner, out, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, inner, generator=torch.Generator().manual_seed(3)).half() / 16)
    return layer.to(dtype).requires_grad_(False)


def int8_by_hand(weight: Tensor) -> Tensor:
    """Dettmers et al. 2022, section 2.1: 127 is the largest of a row."""
    rows = []
    for row in weight.double():
        step = row.abs().max() / 127
        rows.append(torch.round(row / step) * step if step else row)
    return torch.stack(rows)


def nf4_by_hand(weight: Tensor) -> Tensor:
    """Dettmers et al. 2023, equations 1 and 5: the nearest of 16 values, times the largest of 64 weights."""
    table, blocks = torch.tensor(NF4, dtype=torch.float64), []
    for block in weight.double().reshape(-1, 64):
        largest = block.abs().max()
        nearest = [table[(table - value / largest).abs().argmin()] if largest else table[7] for value in block]
        blocks.append(torch.stack(nearest) * largest)
    return torch.cat(blocks).reshape(weight.shape)


BY_HAND = {"int8": int8_by_hand, "nf4": nf4_by_hand}


def test_the_nf4_table_has_the_quantiles_of_the_normal_distribution() -> None:
    """Equation 4: means of neighbouring quantiles, 8 above and 7 below zero, made to reach 1 at both ends."""
    offset = 0.5 * (1 / 32 + 1 / 30)
    above = torch.special.ndtri(torch.linspace(1 - offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above.max()
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), table, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_that_of_the_papers_rounded_once(kind: str, dtype: torch.dtype) -> None:
    whole = linear(dtype=dtype)
    layer = QUANTIZED[kind](whole, CPU)
    expected = BY_HAND[kind](whole.weight)
    assert layer.dense().dtype == dtype
    torch.testing.assert_close(layer.dense(), expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-8)
    error = (expected - whole.weight.double()).norm() / whole.weight.double().norm()
    assert error < ERROR[kind]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_zeros_stay_zero_and_large_weights_finite(kind: str) -> None:
    whole = linear(2, 128)
    with torch.no_grad():
        whole.weight[0], whole.weight[1, :3] = 0, 1e5
    dense = QUANTIZED[kind](whole, CPU).dense()
    assert not dense[0].any()
    assert dense.isfinite().all()


def test_int8_codes_equal_those_of_bitsandbytes() -> None:
    """From ``bitsandbytes.functional.int8_vectorwise_quant`` 0.50.2 of the same weights."""
    layer = QUANTIZED["int8"](golden_weights(), CPU)
    assert layer.codes[:, :8].tolist() == GOLDEN_INT8


def test_nf4_codes_equal_those_of_bitsandbytes() -> None:
    """From ``bitsandbytes.functional.quantize_4bit(blocksize=64, quant_type="nf4")`` 0.50.2 of the same weights."""
    layer = QUANTIZED["nf4"](golden_weights(), CPU)
    assert layer.codes[:, :8].tolist() == GOLDEN_NF4


def golden_weights() -> nn.Linear:
    """Three rows that no generator of random numbers can change."""
    layer = nn.Linear(64, 3, bias=False)
    numbers = torch.arange(192, dtype=torch.float64)
    weight = torch.sin(numbers * 1.7) * (1 + numbers % 7) / 8
    layer.weight = nn.Parameter(weight.half().float().reshape(3, 64), requires_grad=False)
    return layer


GOLDEN_INT8 = [
    [0, 36, -14, -68, 45, 88, -90, -11],
    [33, -28, -57, 65, 65, -111, -7, 35],
    [-41, -43, 82, 39, -127, -2, 37, -9],
]
GOLDEN_NF4 = [
    [122, 98, 190, 22, 169, 38, 246, 88],
    [165, 61, 208, 106, 130, 142, 54, 155],
    [68, 235, 7, 182, 43, 225, 106, 162],
]


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_reads_and_writes_the_same_codes() -> None:
    library = pytest.importorskip("bitsandbytes.functional", reason="needs the extra quant")
    assert bitsandbytes_works(CPU)
    whole = linear(128, 192)
    layer = NF4Linear(whole, CPU)
    codes, state = library.quantize_4bit(whole.weight, blocksize=64, quant_type="nf4")
    assert torch.equal(codes.view_as(layer.codes), layer.codes)
    assert torch.equal(state.absmax, layer.largest.float())
    rows, scales, _ = library.int8_vectorwise_quant(whole.weight.half())
    layer8 = QUANTIZED["int8"](whole, CPU)
    assert torch.equal(rows, layer8.codes)
    torch.testing.assert_close(scales / 127, layer8.scales[:, 0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = NF4Linear(linear(128, 192, dtype=dtype), CPU)
        theirs = expanded_by_bitsandbytes(ours.codes, ours.largest, (128, 192), dtype)
        torch.testing.assert_close(ours.dense(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_a_library_that_is_missing_fails_or_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Tensor:
        raise ModuleNotFoundError

    def failing(*_: object) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    def wrong(codes: Tensor, largest: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return 1.01 * quantized.expanded(codes, largest, shape, dtype)

    found = []
    for library in (missing, failing, wrong, quantized.expanded):
        monkeypatch.setattr(quantized, "expanded_by_bitsandbytes", library)
        found.append(bitsandbytes_works.__wrapped__(CPU))
    assert found == [False, False, False, True]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_products_and_gradients_equal_the_dequantised_formula_in_float64(kind: str, bias: bool) -> None:
    layer = QUANTIZED[kind](linear(bias=bias), CPU)
    weight, offset = layer.dense().double(), layer.bias.double() if layer.bias is not None else 0
    down, up = torch.randn(3, 64, requires_grad=True), torch.randn(40, 3, requires_grad=True)
    gradients = (torch.zeros_like(down), torch.zeros_like(up))
    x, grad_y = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 40)
    x64, down64, up64 = (t.detach().double().requires_grad_() for t in (x, down, up))

    y, y64 = layer(x), x64 @ weight.T + offset
    y.backward(grad_y)
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), torch.autograd.grad(y64, x64, grad_y.double())[0], rtol=1e-5, atol=1e-5)

    x.grad = None
    lora = LoraLinear(layer, down, up, 0.7, gradients=gradients)
    y, y64 = lora(x), x64 @ (weight + 0.7 * up64 @ down64).T + offset
    y.backward(grad_y)
    torch.testing.assert_close(y.double(), y64, rtol=1e-4, atol=1e-4)
    references = torch.autograd.grad(y64, (x64, down64, up64), grad_y.double())
    for ours, reference in zip((x.grad, *gradients), references, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lora.plain(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_no_whole_weight_is_kept_for_the_backward_pass(kind: str) -> None:
    layer, kept = QUANTIZED[kind](linear(), CPU), []
    down, up = torch.randn(3, 64, requires_grad=True), torch.randn(40, 3, requires_grad=True)
    lora = LoraLinear(layer, down, up, 0.7, gradients=(torch.zeros_like(down), torch.zeros_like(up)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(5, 64, requires_grad=True))
        assert kept == []
        lora(torch.randn(5, 64, requires_grad=True))
    assert (40, 64) not in map(tuple, kept)


GIGABYTES = {"sd1": {"none": 1.719, "int8": 1.478, "nf4": 1.363}, "sdxl": {"none": 5.135, "int8": 2.957, "nf4": 1.927}}
"""Of the UNet in half precision."""


@pytest.mark.parametrize("family", GIGABYTES)
@pytest.mark.parametrize("kind", ["none", *QUANTIZED])
def test_bytes_of_a_unet_of_full_size(family: str, kind: str) -> None:
    unet = published(family)["unet"].bfloat16()
    linears = {n: m.weight.numel() for n, m in unet.named_modules() if isinstance(m, nn.Linear)}
    if kind != "none":
        quantize_unet(unet, kind, META)
    held = sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
    assert held / 1e9 == pytest.approx(GIGABYTES[family][kind], abs=1e-3)
    quantized = {n for n, m in unet.named_modules() if isinstance(m, QuantizedLinear)}
    assert quantized == ({n for n in linears if "transformer_blocks" in n} if kind != "none" else set())
    numbers, half = sum(linears[name] for name in quantized), 2 * UNET_PARAMETERS[family]
    if kind == "nf4":
        assert held == half - 2 * numbers + numbers // 2 + 2 * numbers // 64
    assert held <= half
