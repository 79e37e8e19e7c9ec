"""Parts of a base are on the device while they work and in main memory while they are idle.

The meta device stands in for a GPU: a tensor is either there or in main memory.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sdlora.base import load
from sdlora.base.base import Base
from sdlora.base.conditioning import Conditioning
from sdlora.base.device_memory import Room, move_to, out_of_memory, working_on
from sdlora.base.encode import Posterior
from sdlora.cache.store import EncodedCache
from sdlora.config.sections import Config
from sdlora.progress import Silence
from sdlora.training import caption_embeddings, latents, session
from sdlora.training.caption_embeddings import CaptionEmbeddings, open_caption_embeddings
from sdlora.training.plan import plan_config
from tests.conftest import write_images
from tests.tiny import CPU, opened
from tests.training_runs import config_for, losses, session_for

META = torch.device("meta")
FROZEN = "optimizer.text_encoder_learning_rate=0"


def on_device(base: Base) -> set[str]:
    """The parts that are not in main memory."""
    parts: dict[str, nn.Module] = {"unet": base.unet, "vae": base.vae}
    parts |= {encoder.facts.part: encoder.model for encoder in base.text_encoders}
    places = {part: {p.device.type for p in (*m.parameters(), *m.buffers())} for part, m in parts.items()}
    assert all(len(found) == 1 for found in places.values()), places
    return {part for part, found in places.items() if found == {"meta"}}


def opening(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[list[set[str]], Base, session.TrainingSession]:
    """What is on the device whenever a part works while a session opens, the base, and the session."""
    plan = plan_config(config)
    base = load.load_base(plan.base, device=META, home=CPU, dtype=torch.float32)
    assert on_device(base) == set()
    seen: list[set[str]] = []

    def encode_pixels(base: Base, pixels: torch.Tensor) -> Posterior:
        seen.append(on_device(base))
        height, width = pixels.shape[-2:]
        return Posterior(
            mean=torch.zeros(1, 4, height // 8, width // 8), std=torch.zeros(1, 4, height // 8, width // 8)
        )

    def encode_prompts(base: Base, prompts: Any) -> Conditioning:
        seen.append(on_device(base))
        return Conditioning(context=torch.zeros(1, 77, 128), pooled=torch.zeros(1, 48))

    monkeypatch.setattr(latents, "encode_pixels", encode_pixels)
    monkeypatch.setattr(caption_embeddings, "encode_prompts", encode_prompts)
    monkeypatch.setattr(session, "GuardedAdamW", MagicMock())
    return seen, base, session.open_session(plan, base, Accelerator(), Silence())


def test_each_part_is_on_the_device_only_while_it_works(
    tiny_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, more = (
        write_images(tmp_path / "set", 3),
        ("cache.disk=false", "data.resolution=64", "data.caption_dropout=0.1"),
    )
    config = config_for(tiny_files["sdxl"], images, tmp_path / "x.safetensors", *more, FROZEN)
    seen, base, opened_session = opening(config, monkeypatch)
    encoders = {"text_encoder", "text_encoder_2"}
    assert seen == [{"vae"}] * 3 + [encoders] * 4  # Three captions and the empty one.
    assert on_device(base) == {"unet"}
    assert {image.mean.device.type for image in opened_session.images.values()} == {"meta"}
    rows = opened_session.embeddings.encode(["zorb, a thing of kind 0", ""])
    assert rows.context.device == META
    assert len(seen) == 7
    # What was not foreseen is encoded all the same, and the encoders leave again.
    opened_session.embeddings.encode(["something else"])
    assert seen[7:] == [{"unet", *encoders}]
    assert on_device(base) == {"unet"}


def test_trained_text_encoders_stay_on_the_device(
    tiny_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, more = write_images(tmp_path / "set", 2), ("cache.disk=false", "data.resolution=64")
    config = config_for(tiny_files["sdxl"], images, tmp_path / "x.safetensors", *more)
    seen, base, _ = opening(config, monkeypatch)
    assert seen == [{"vae"}] * 2
    assert on_device(base) == {"unet", "text_encoder", "text_encoder_2"}


def test_with_too_many_captions_the_text_encoders_stay(
    tiny_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_embeddings, "AHEAD_BYTES", 2 * 77 * 128 * 4)
    images, more = write_images(tmp_path / "set", 3), ("cache.disk=false", "data.resolution=64")
    config = config_for(tiny_files["sdxl"], images, tmp_path / "x.safetensors", *more, FROZEN)
    seen, base, _ = opening(config, monkeypatch)
    assert seen == [{"vae"}] * 3
    assert on_device(base) == {"unet", "text_encoder", "text_encoder_2"}


def test_a_part_gets_its_own_tensors_back(tiny_files: dict[str, Path]) -> None:
    model = opened(tiny_files["sd1"]).text_encoders[0].model
    before = [(name, tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())]

    def fail() -> None:
        with working_on(META, model):
            assert {parameter.device for parameter in model.parameters()} == {META}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(after.pop(name) is tensor for name, tensor in before)
    assert not after


def test_on_a_cpu_nothing_is_moved(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("moved")

    base = opened(tiny_base)
    monkeypatch.setattr(nn.Module, "to", refuse)
    monkeypatch.setattr("sdlora.base.device_memory._copy", refuse)
    move_to(CPU, base.unet)
    with working_on(CPU, base.vae):
        pass
    session_for(tiny_base, images, tmp_path / "x.safetensors", FROZEN, "cache.disk=false")


def embeddings_for(
    base: Path, images: Path, out: Path, cache: EncodedCache, ahead: list[str] | None
) -> CaptionEmbeddings:
    plan = plan_config(config_for(base, images, out, FROZEN))
    return open_caption_embeddings(
        opened(base), plan.items, plan.config, cache, room=Room(CPU), ahead=ahead, progress=Silence()
    )


def test_captions_encoded_ahead_are_those_of_a_step(
    tiny_base: Path, images: Path, tmp_path: Path, cache: EncodedCache
) -> None:
    captions, nowhere = ["a thing", "", "another (thing)"], EncodedCache(None, 0)
    out = tmp_path / "x.safetensors"
    ahead = embeddings_for(tiny_base, images, out, cache, captions)
    later = embeddings_for(tiny_base, images, out, nowhere, None)
    assert torch.equal(ahead.encode(captions).context, later.encode(captions).context)
    assert sum(1 for _ in (tmp_path / "cache").rglob("*.safetensors")) == 3


def test_a_step_does_not_wait_for_the_disk(
    tiny_base: Path, images: Path, tmp_path: Path, cache: EncodedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = embeddings_for(tiny_base, images, tmp_path / "x.safetensors", cache, [])
    disk, put = threading.Event(), cache.put

    def slow(*given: Any) -> None:
        assert disk.wait(30)
        put(*given)

    monkeypatch.setattr(cache, "put", slow)
    monkeypatch.setattr(caption_embeddings, "WAITING_WRITES", 2)
    embeddings.encode(["one", "two", "three"])
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    disk.set()
    embeddings.close()
    assert sum(1 for _ in (tmp_path / "cache").rglob("*.safetensors")) == 2


def test_what_finds_no_room_stays_in_main_memory() -> None:
    room = Room(META, 100)
    mean, std = torch.zeros(10), torch.zeros(10)
    assert [tensor.device for tensor in room.keep([mean, std])] == [META, META]
    assert [tensor.device for tensor in room.keep([mean])] == [CPU]
    assert [tensor.device for tensor in room.keep([torch.zeros(5)])] == [META]


def test_latents_in_main_memory_train_the_same(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, more = tmp_path / "x.safetensors", (FROZEN, "cache.disk=false")
    expected = losses(session_for(tiny_base, images, out, *more), 3)
    monkeypatch.setattr(session, "Room", lambda device, *_: Room(device, 0))
    assert losses(session_for(tiny_base, images, out, *more), 3) == expected


def test_images_are_encoded_in_float32_and_samples_decoded_as_when_generating(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdlora as package
    from sdlora.training import sample_sheet

    encoding, decoding = set(), set()
    encode, write = latents.encode_pixels, sample_sheet.write_samples
    monkeypatch.setattr(
        latents, "encode_pixels", lambda base, pixels: (encoding.add(base.vae.dtype), encode(base, pixels))[1]
    )
    monkeypatch.setattr(
        sample_sheet,
        "write_samples",
        lambda base, *given, **named: (decoding.add(base.vae.dtype), write(base, *given, **named))[1],
    )
    more = ("train.steps=1", "train.precision=bfloat16", "cache.disk=false")
    package.train(config_for(tiny_base, images, tmp_path / "x.safetensors", *more))
    assert (encoding, decoding) == ({torch.float32}, {torch.bfloat16})


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
])  # fmt: skip
def test_shortages_are_known_by_what_devices_say(error: Exception) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("expected scalar type Float but found Half"))
    assert not out_of_memory(ValueError("out of memory"))
