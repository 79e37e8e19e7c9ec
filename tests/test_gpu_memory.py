"""What a run holds on a CUDA device: parts that are idle leave it, and what does not fit is spilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sdlora
from sdlora.base.base import Base
from sdlora.training import caption_embeddings, latents, loop
from tests.conftest import write_images
from tests.training_runs import config_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FROZEN = ("optimizer.text_encoder_learning_rate=0", "cache.disk=false", "data.resolution=64", "train.steps=3")


def on_device(base: Base) -> set[str]:
    parts = {"unet": base.unet, "vae": base.vae} | {e.facts.part: e.model for e in base.text_encoders}
    return {part for part, model in parts.items() if all(p.is_cuda for p in model.parameters())}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """What is on the device while images are encoded, captions are encoded, and steps are done."""
    found: dict[str, set[str]] = {}

    def spied(module: Any, name: str) -> None:
        original = getattr(module, name)

        def spy(base: Base, *given: Any, **named: Any) -> Any:
            found[name] = on_device(base if isinstance(base, Base) else base.session.base)
            return original(base, *given, **named)

        monkeypatch.setattr(module, name, spy)

    spied(latents, "encode_pixels")
    spied(caption_embeddings, "encode_prompts")
    spied(loop, "train_steps")
    return found


def test_idle_parts_leave_the_device(tiny_files: dict[str, Path], tmp_path: Path, seen: dict[str, set[str]]) -> None:
    images = write_images(tmp_path / "set", 3)
    report = sdlora.train(
        config_for(tiny_files["sdxl"], images, tmp_path / "x.safetensors", *FROZEN, "samples.prompts=['a fox']")
    )
    assert seen == {
        "encode_pixels": {"vae"},
        "encode_prompts": {"text_encoder", "text_encoder_2"},
        "train_steps": {"unet"},
    }
    assert report.samples is not None


def test_spilled_latents_and_embeddings_train_the_same(
    tiny_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlora.base.device_memory import Room
    from sdlora.training import session

    images, losses = write_images(tmp_path / "set", 3), []
    for spill in (False, True):
        if spill:
            monkeypatch.setattr(session, "Room", lambda device, *_: Room(device, 0))
        output = tmp_path / f"{spill}.safetensors"
        more = ("train.precision=float32", *FROZEN)
        losses.append(sdlora.train(config_for(tiny_files["sdxl"], images, output, *more)).result.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_with_fit_a_run_ends_in_less_memory(
    tiny_files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "set", 8)
    more = (*FROZEN, "data.resolution=256", "train.batch_size=8", "train.micro_batch=8", "samples.prompts=[]")

    def train(name: str, *others: str) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        output = tmp_path / f"{name}.safetensors"
        sdlora.train(config_for(tiny_files["sdxl"], images, output, *more, *others))
        return torch.cuda.max_memory_reserved()

    whole, one = train("whole"), train("one", "train.micro_batch=1")
    assert one < whole
    torch.cuda.set_per_process_memory_fraction((whole + one) / 2 / torch.cuda.get_device_properties(0).total_memory)
    try:
        train("fit", "train.fit=true")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with 8 images at once" in caplog.text
