"""A base that stays loaded between calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sdlora
from sdlora.errors import BaseModelError, SdloraError
from tests.test_generation import random_lora
from tests.test_samples import counted_loads

SMALL: dict[str, Any] = {"seed": 1, "steps": 2}


def test_other_loras_need_no_reload_and_leave_no_trace(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [random_lora(tiny_base, tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    loaded = counted_loads(monkeypatch)
    choices: list[list[Any]] = [[], [files[0]], files, [f"{files[1]}:0.5"], []]
    with sdlora.open(tiny_base) as studio:
        assert loaded == []
        made = [studio.generate("a fox", loras=loras, **SMALL)[0] for loras in choices]
        strip, parameters = studio.generate_strip(["a fox"], loras=files[0], **SMALL)
        assert len(loaded) == 1
    for image, loras in zip(made, choices, strict=True):
        (alone,) = sdlora.generate("a fox", base=tiny_base, loras=loras, **SMALL)
        assert (torch.equal(image.latents, alone.latents), image.parameters) == (True, alone.parameters)
    expected = sdlora.generate_strip(["a fox"], base=tiny_base, loras=files[0], **SMALL)
    assert (strip.tobytes(), parameters) == (expected[0].tobytes(), expected[1])


def test_a_closed_studio_says_so(tiny_base: Path) -> None:
    studio = sdlora.open(tiny_base)
    studio.close()
    studio.close()
    with pytest.raises(SdloraError, match=r"the studio is closed; open another with sdlora\.open"):
        studio.generate("a fox")


def test_faults_are_found_before_anything_is_loaded(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseModelError, match="no such base"):
        sdlora.open("nowhere")
    loaded = counted_loads(monkeypatch)
    studio = sdlora.open(tiny_base)
    for options in ({"size": 63}, {"loras": "none.safetensors"}, {"cfg": -1.0}):
        with pytest.raises(SdloraError):
            studio.generate("a fox", **options)  # ty: ignore[invalid-argument-type]
    assert loaded == []
