"""The one place where a UNet is called, and what it takes and returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sdlora
from sdlora.base.conditioning import Conditioning, Framing, time_ids
from sdlora.base.encode import encode_prompts
from sdlora.base.tokens import plain, tokenize
from tests.tiny import opened


def test_the_unet_is_called_in_one_place() -> None:
    package = Path(sdlora.__file__).parent
    callers = {
        file.relative_to(package).as_posix(): text.count("unet(")
        for file in package.rglob("*.py")
        if ".unet(" in (text := file.read_text(encoding="utf-8"))
    }
    assert callers == {"base/base.py": 1}


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_is_the_unets_own_and_float32(tiny_files: dict[str, Path], family: str, dtype: torch.dtype) -> None:
    base = opened(tiny_files[family], dtype)
    one = encode_prompts(base, [tokenize(base, plain("a fox"))])
    conditioning = Conditioning.stack([one, one])
    noisy, sizes = torch.randn(2, 4, 8, 8), time_ids([Framing.whole(64, 64)] * 2)
    predicted = base.predict(noisy, torch.tensor(500), conditioning, sizes)
    added = None
    if family == "sdxl":
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        added = {"text_embeds": conditioning.pooled, "time_ids": sizes}
    times = torch.tensor([500, 500])
    expected = base.unet(noisy.to(dtype), times, conditioning.context, added_cond_kwargs=added).sample
    assert predicted.dtype == torch.float32
    assert torch.equal(predicted, expected.float())
