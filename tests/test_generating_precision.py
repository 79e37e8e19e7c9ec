"""The precision in which images are decoded, by device, and how far those of float16 are from float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sdlora
from sdlora.base.checkpoint import MINI_FOLDER
from sdlora.base.load import decoding_dtype
from tests.test_generation import random_lora

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize("in_hardware", [True, False])
def test_images_are_decoded_in_what_does_not_overflow(in_hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: in_hardware)
    decoding = [decoding_dtype(torch.float16, device) for device in (CPU, CUDA, MPS)]
    assert decoding == [torch.float32, torch.bfloat16 if in_hardware else torch.float32, torch.float32]
    for device in (CPU, CUDA, MPS):
        assert decoding_dtype(torch.bfloat16, device) == torch.bfloat16
        assert decoding_dtype(torch.float32, device) == torch.float32


def test_float16_images_are_closer_to_float32_than_those_of_bfloat16(tmp_path: Path) -> None:
    """Four steps on the trained embedded base under a LoRA: pixels within a fifth of one of 255 steps on average."""
    file = random_lora(MINI_FOLDER, tmp_path / "x.safetensors", seed=1, alpha=0.1)

    def pixels(precision: str) -> torch.Tensor:
        (drawn,) = sdlora.generate("a (red:1.2) fox", loras=file, seed=1, steps=4, precision=precision)
        return torch.tensor(list(drawn.image.tobytes()), dtype=torch.float32)

    exact = pixels("float32")
    half, brain = ((pixels(precision) - exact).abs().mean() for precision in ("float16", "bfloat16"))
    assert half < 0.2
    assert half < brain / 3
