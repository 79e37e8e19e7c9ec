"""A base that stays loaded between calls."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import sdlora
from sdlora.errors import BaseModelError, SdloraError
from sdlora.generation import images
from sdlora.generation import loras as lora_reading
from sdlora.lora.merging import MergedModule
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


def test_on_a_small_device_text_encoders_make_room(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts are encoded first; the images are the same."""
    given: dict[str, Any] = {"base": tiny_base, "seed": 1, "steps": 2, "count": 3}
    expected = sdlora.generate(["a fox", "a long prompt " * 60], **given)
    events: list[str] = []

    def note(event: str, function: Any) -> Any:
        return lambda *given, **named: (events.append(event), function(*given, **named))[1]

    monkeypatch.setattr(images, "free_memory", lambda device: images.ROOM - 1)
    for name in ("encode_requests", "denoise", "move_to"):
        monkeypatch.setattr(images, name, note(name, getattr(images, name)))
    drawn = sdlora.generate(["a fox", "a long prompt " * 60], **given)
    assert events == ["encode_requests"] * 2 + ["move_to"] + ["denoise"] * 2 + ["move_to"]
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(drawn, expected, strict=True))


def test_images_that_do_not_fit_together_are_generated_one_by_one(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"base": tiny_base, "steps": 2, "negative": "blue"}
    prompts = ["a fox", "a tower"]
    alone = [sdlora.generate(prompt, seed=1, **given)[0] for prompt in prompts]
    denoise, most, tried = images.denoise, 1, list[int]()

    def small(base: Any, batch: Any, *more: Any) -> torch.Tensor:
        tried.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(base, batch, *more)

    monkeypatch.setattr(images, "denoise", small)
    with caplog.at_level(logging.WARNING, "sdlora"):
        drawn = sdlora.generate(prompts, seed=1, **given)
    assert [record.getMessage() for record in caplog.records] == [
        "the cpu has too little memory for 2 images of 64 x 64 pixels at once; they are generated one by one"
    ]
    for one, other in zip(drawn, alone, strict=True):
        assert (one.latents - other.latents).abs().max() < 1e-4
    # What did not fit is not tried again, nor is it said again; smaller batches are drawn together.
    caplog.clear()
    tried.clear()
    most = 2
    sdlora.generate("a fox", seed=1, count=7, batch_size=3, **given)
    assert (tried, len(caplog.records)) == ([3, *[1] * 7], 1)
    tried.clear()
    sdlora.generate("a fox", seed=1, count=5, batch_size=3, **given)
    assert tried == [3, 1, 1, 1, 2]
    most = 0
    with (
        sdlora.open(tiny_base) as studio,
        pytest.raises(SdloraError, match="too little memory for an image of 64 x 64 pixels; choose a smaller size"),
    ):
        studio.generate("a fox", seed=1, steps=1)


def test_a_call_changes_nothing_but_what_differs_from_the_call_before(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [random_lora(tiny_base, tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    reads, merged = [], []
    read, merge = lora_reading.read_lora, MergedModule.set
    monkeypatch.setattr(lora_reading, "read_lora", lambda file: (reads.append(file), read(file))[1])
    monkeypatch.setattr(MergedModule, "set", lambda self, given: (merged.append(self), merge(self, given))[1])
    with sdlora.open(tiny_base) as studio:
        first = studio.generate("a fox", loras=[files[0]], **SMALL)[0]
        whole, merged[:] = len(merged), []
        again = studio.generate("a fox", loras=[files[0]], **SMALL)[0]
        assert (merged, reads, torch.equal(first.latents, again.latents)) == ([], [files[0]], True)
        studio.generate("a fox", loras=[f"{files[0]}:1:0.5"], **SMALL)
        assert 0 < len(merged) < whole / 2
        random_lora(tiny_base, files[0], seed=3)
        other = studio.generate("a fox", loras=[files[0]], **SMALL)[0]
        assert not torch.equal(first.latents, other.latents)
        assert len(reads) == 2
