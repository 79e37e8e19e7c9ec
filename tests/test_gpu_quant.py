"""Quantised weights on a CUDA device: the same codes as on the CPU, no waiting, and the memory that they promise."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import sdlora
from sdlora.base.checkpoint import find_base
from sdlora.base.load import load_base
from sdlora.config.sections import BaseSection
from sdlora.lora import quantized
from sdlora.lora.layers import LoraLinear
from sdlora.lora.quantized import QUANTIZED, NF4Linear, bitsandbytes_works
from tests.conftest import write_images
from tests.training_runs import config_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # bitsandbytes warns when it is imported.
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OUT, IN = 10240, 1280
"""The largest layer of SDXL."""


def whole(dtype: torch.dtype = torch.float16) -> nn.Linear:
    return nn.Linear(IN, OUT).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_weights_are_those_of_the_cpu(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = whole(dtype)
    here, there = (QUANTIZED[kind](layer, device) for device in (CPU, CUDA))
    assert there.device.type == "cuda"
    for ours, reference in zip(there.buffers(), here.buffers(), strict=True):
        assert torch.equal(ours.cpu(), reference)
    monkeypatch.setattr(quantized, "bitsandbytes_works", lambda device: False)
    assert torch.equal(there.dense().cpu(), here.dense())


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra quant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_of_bitsandbytes_expands_the_same_weights(dtype: torch.dtype) -> None:
    layer = whole(dtype)
    here, there = (NF4Linear(layer, device).dense().cpu() for device in (CPU, CUDA))
    assert bitsandbytes_works(torch.device("cuda", 0))
    torch.testing.assert_close(there, here, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_layer_does_not_wait_and_keeps_no_whole_weight(kind: str) -> None:
    base = QUANTIZED[kind](whole(), CUDA)
    down, up = (torch.randn(shape, device=CUDA, dtype=torch.float16) for shape in ((16, IN), (OUT, 16)))
    gradients = (torch.zeros_like(down), torch.zeros_like(up))
    layer = LoraLinear(base, down.requires_grad_(), up.requires_grad_(), 0.5, gradients=gradients)
    x = torch.randn(64, IN, device=CUDA, dtype=torch.float16, requires_grad=True)
    layer(x).backward(torch.ones(64, OUT, device=CUDA, dtype=torch.float16))
    torch.cuda.synchronize()
    x.grad, before = None, torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(x)
        kept = torch.cuda.memory_allocated() - before
        y.backward(torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept < OUT * IN
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_loading_never_holds_the_whole_unet(kind: str) -> None:
    """Of mini, in bfloat16: its UNet alone takes 37 MB."""
    sizes = {}
    for name in ("none", kind):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        checkpoint = find_base(BaseSection(path="mini", quantization=name))
        base = load_base(checkpoint, device=CUDA, dtype=torch.bfloat16)
        sizes[name] = torch.cuda.max_memory_allocated() - before
        del base
    assert sizes[kind] < sizes["none"]


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_run_with_its_samples(tiny_files: dict[str, Path], tmp_path: Path, kind: str, precision: str) -> None:
    images, losses = write_images(tmp_path / "images", 3), {}
    for name in ("none", kind):
        more = (f"base.quantization={name}", f"train.precision={precision}", "samples.prompts=['a red fox']")
        report = sdlora.train(
            config_for(tiny_files["sdxl"], images, tmp_path / name / "x.safetensors", *more, "data.resolution=64")
        )
        assert report.samples is not None
        assert report.samples.exists()
        losses[name] = report.result.loss
    assert losses[kind] == pytest.approx(losses["none"], rel=0.05)
