"""Sampling at full size on the meta device: nothing is read back, and a step copies nothing but a sampler's new noise.

See ``tests/full_size.py`` for what the meta device shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlora.base.base import Base
from sdlora.generation.denoise import denoise
from sdlora.generation.request import ImageRequest
from sdlora.generation.samplers import SAMPLERS
from sdlora.generation.scheduled_prompt import encode_requests
from sdlora.progress import Silence
from tests.full_size import META, Watch, full_size_base

LATENTS = (1, 4, 128, 128)


def copies(base: Base, *, sampler: str, steps: int, cfg: float = 5.0) -> list[tuple[int, ...]]:
    """Shapes of what is copied to the device while an image of 1024 x 1024 pixels is generated."""
    requests = [ImageRequest(prompt="a (red:1.2) fox", size=(1024, 1024), steps=steps, sampler=sampler, cfg=cfg)]
    with torch.no_grad():
        conditioning = encode_requests(base, requests)
        with Watch() as watch:
            latents = denoise(base, requests, conditioning, Silence())
    assert (tuple(latents.shape), latents.dtype, latents.device) == (LATENTS, torch.float32, META)
    return [tuple(shape) for shape in watch.copied]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_full_size_image_is_denoised_without_reading_back(family: str, tiny_files: dict[str, Path]) -> None:
    made = copies(full_size_base(tiny_files[family], torch.float16), sampler="dpm++2m", steps=2)
    # The noise, the timesteps, and the sizes of the image for both prompts.
    assert made == [(2, 6), LATENTS, (2,)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_a_step_copies_nothing_but_new_noise(
    sampler: str, cfg: float, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(base: Base, noisy: Tensor, timesteps: Tensor, *_: Any) -> Tensor:
        assert timesteps.device == META
        return torch.zeros_like(noisy)

    monkeypatch.setattr(Base, "predict", predicted)
    base = full_size_base(tiny_files["sdxl"], torch.float16)
    few, many = (copies(base, sampler=sampler, steps=steps, cfg=cfg) for steps in (4, 9))
    of_steps = many.count(LATENTS) - few.count(LATENTS)
    # DPM++ SDE draws noise for both calls of a step.
    of_a_step = 2 if sampler == "dpm++sde" else int(SAMPLERS[sampler].adds_noise)
    assert of_steps == 5 * of_a_step
    assert len(many) - len(few) == of_steps
