"""What generating needs on a CUDA device, from the real computation on models of the published sizes without memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sdlora.base.base import Base
from sdlora.generation.denoise import denoise
from sdlora.generation.request import ImageRequest
from sdlora.generation.scheduled_prompt import encode_requests
from sdlora.progress import Silence
from sdlora.training.live_bytes import LiveBytes, attention_of
from sdlora.training.memory import model_bytes
from tests.full_size import META, full_size_base


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Bytes on the device in each phase. The text encoders are in main memory in the last two."""

    merging_and_encoding: int
    sampling: int
    decoding: int


@torch.no_grad()
def phases(base: Base, side: int, vae_dtype: torch.dtype) -> Phases:
    """Of one image with a negative prompt, the base in float16; LoRAs of any number are merged in place."""
    requests = [ImageRequest(prompt="a red fox", negative="blue", size=(side, side), steps=2)]
    vae, encoders = base.vae.to(vae_dtype), sum(map(model_bytes, base.encoder_models()))
    weights = model_bytes(base.unet) + model_bytes(vae)
    # Two copies of the largest weight in float32: tests/test_merging.py.
    merging = 2 * 4 * max(parameter.numel() for parameter in base.unet.parameters())
    with attention_of("cuda"):
        with LiveBytes() as encoding:
            conditioning = encode_requests(base, requests)
        with LiveBytes() as sampling:
            latents = denoise(base, requests, conditioning, Silence())
        with LiveBytes() as decoding:
            vae.decode(latents.to(vae_dtype))
    return Phases(
        merging_and_encoding=weights + encoders + max(merging, encoding.peak),
        sampling=weights + sampling.peak,
        decoding=weights + decoding.peak,
    )


@pytest.mark.parametrize(
    ("family", "side", "vae_dtype", "expected"),
    [
        ("sdxl", 1024, torch.bfloat16, (7.17, 5.64, 6.91)),
        ("sd1", 512, torch.float32, (2.54, 2.19, 2.86)),
    ],
)
def test_generating_fits_where_it_is_said_to_fit(
    family: str, side: int, vae_dtype: torch.dtype, expected: tuple[float, ...], tiny_files: dict[str, Path]
) -> None:
    """The figures of ``docs/gpu.md``, in GB."""
    base = full_size_base(tiny_files[family], torch.float16)
    assert base.device == META
    needed = phases(base, side, vae_dtype)
    made = (needed.merging_and_encoding, needed.sampling, needed.decoding)
    assert [size / 1e9 for size in made] == pytest.approx(expected, abs=0.02)
    assert max(made) < (8e9 if family == "sdxl" else 4e9)
