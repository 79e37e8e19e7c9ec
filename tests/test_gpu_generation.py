"""Generating on a CUDA device: images as on the CPU, memory at the size of SDXL, nothing that waits in a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdlora
from sdlora.base.base import Base
from sdlora.base.checkpoint import MINI_FOLDER
from sdlora.base.load import decoding_dtype
from sdlora.base.strips import decode_in_strips
from sdlora.generation import images, studio
from sdlora.generation.denoise import denoise
from sdlora.generation.images import generate_images
from sdlora.generation.loras import LoraChoice
from sdlora.generation.request import ImageRequest
from sdlora.generation.samplers import SAMPLERS
from sdlora.generation.scheduled_prompt import encode_requests
from sdlora.lora.low_rank import LowRank
from sdlora.lora.stack import temporarily_applied
from sdlora.lora.targets import choose_targets
from sdlora.progress import Silence
from tests.full_size import full_size_base
from tests.test_generation import random_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
SMALL_CARD = 8e9
"""Bytes."""


def filled(model: nn.Module) -> nn.Module:
    """``model`` from the meta device on CUDA, with random weights that neither grow nor fade from layer to layer."""
    model.to_empty(device=CUDA)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5 * parameter[0].numel() ** -0.5)
        else:
            parameter.data.fill_(float(name.endswith("weight")))
    for module in model.modules():
        if isinstance(getattr(module, "position_ids", None), Tensor):
            module.position_ids = torch.arange(77, device=CUDA).expand(1, -1)
    return model


def on_cuda(base: Base) -> Base:
    """A base of full size from the meta device, in float16, as it is loaded to generate."""
    base.vae.to(decoding_dtype(torch.float16, CUDA))
    for model in (base.unet, base.vae, *base.encoder_models()):
        filled(model)
    return replace(base, device=CUDA, schedule=base.schedule.of(base.checkpoint.schedule).to(CUDA))


@pytest.fixture
def sdxl(tiny_files: dict[str, Path]) -> Base:
    return on_cuda(full_size_base(tiny_files["sdxl"], torch.float16))


def weighted(base: Base, *, seed: int) -> Any:
    """A LoRA of rank 16 for every attention projection, as ``generate_images`` takes it."""
    generator = torch.Generator().manual_seed(seed)
    targets = choose_targets(base.modules(), "attention")
    changes = {
        name: LowRank(
            down=torch.randn(16, module.in_features, generator=generator) / 100,
            up=torch.randn(module.out_features, 16, generator=generator) / 100,
            alpha=16.0,
        )
        for name, module in targets.items()
    }
    return SimpleNamespace(
        changes=lambda: {name: (change, 0.5) for name, change in changes.items()},
        fitted=SimpleNamespace(autov3=None),
        tag_name=f"lora {seed}",
        choice=LoraChoice(file=Path("x.safetensors"), unet=0.5, text_encoder=0.5),
    )


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device as one of 8 GB: no more can be taken, and no more is reported as free."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(SMALL_CARD / torch.cuda.mem_get_info(CUDA)[1])
    monkeypatch.setattr(images, "free_memory", lambda device: SMALL_CARD - torch.cuda.memory_allocated(device))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_float16_images_are_those_of_the_cpu_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = random_lora(MINI_FOLDER, tmp_path / "x.safetensors", seed=1, alpha=0.1)

    def drawn() -> sdlora.generation.images.GeneratedImage:  # ty: ignore[unresolved-attribute]
        return sdlora.generate("a (red:1.2) fox", loras=file, seed=1, steps=4)[0]

    on_gpu = drawn()
    monkeypatch.setattr(studio, "choose_device", lambda: torch.device("cpu"))
    on_cpu = drawn()
    assert (on_gpu.latents - on_cpu.latents).abs().max() < 0.1 * on_cpu.latents.std()
    pixels = [torch.tensor(list(image.image.tobytes()), dtype=torch.float32) for image in (on_gpu, on_cpu)]
    assert (pixels[0] - pixels[1]).abs().mean() < 1


def test_sdxl_at_1024_with_three_loras_stays_under_8_gb(sdxl: Base, small_card: None) -> None:
    torch.cuda.reset_peak_memory_stats()
    requests = [ImageRequest(prompt="a red fox", negative="blue", size=(1024, 1024), steps=3, seed=s) for s in (1, 2)]
    made = generate_images(sdxl, requests, [weighted(sdxl, seed=seed) for seed in range(3)], Silence())
    assert [image.image.size for image in made] == [(1024, 1024)] * 2
    peak = torch.cuda.max_memory_allocated()
    print(f"SDXL, 1024 x 1024, three LoRAs: peak {peak / 1e9:.2f} GB")
    assert peak < SMALL_CARD


def test_merging_takes_two_weights_in_float32_and_gives_every_bit_back(sdxl: Base) -> None:
    modules = sdxl.modules()
    loras = [weighted(sdxl, seed=seed).changes() for seed in range(3)]
    pristine = {name: modules[name].weight.detach().cpu() for name in loras[0]}  # ty: ignore[unresolved-attribute]
    largest = max(weight.numel() for weight in pristine.values()) * 4
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with temporarily_applied(modules, loras):
        assert torch.cuda.memory_allocated() <= before
        assert torch.cuda.max_memory_allocated() - before < 2.2 * largest
        changed = sum(not torch.equal(modules[name].weight.cpu(), w) for name, w in pristine.items())  # ty: ignore[unresolved-attribute]
        assert changed == len(pristine)
    for name, weight in pristine.items():
        assert torch.equal(modules[name].weight.cpu(), weight)  # ty: ignore[unresolved-attribute]


@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if not sampler.adds_noise])
def test_no_step_waits_for_the_device(
    sampler: str, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tiny import opened

    base = opened(tiny_files["sdxl"])
    for model in (base.unet, *base.encoder_models()):
        model.to(CUDA)
    base = replace(base, device=CUDA)
    predict = Base.predict

    def watched(*given: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        return predict(*given)

    monkeypatch.setattr(Base, "predict", watched)
    requests = [ImageRequest(prompt="a fox", steps=5, size=(64, 64), sampler=sampler)]
    conditioning = encode_requests(base, requests)
    try:
        with torch.no_grad():
            denoise(base, requests, conditioning, Silence())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_strips_take_a_fraction_of_the_memory(tiny_files: dict[str, Path]) -> None:
    vae: Any = filled(full_size_base(tiny_files["sdxl"], torch.float32).vae)
    latents, peaks, decoded = torch.randn(1, 4, 128, 128, device=CUDA), [], []
    for decode in (lambda: vae.decode(latents).sample, lambda: decode_in_strips(vae, latents)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        decoded.append(decode().cpu())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    print(f"decoding 1024 x 1024 in float32: {peaks[0] / 1e9:.2f} GB at once, {peaks[1] / 1e9:.2f} GB in strips")
    assert peaks[1] < peaks[0] / 3
    # Convolutions may round to TensorFloat-32 here.
    assert (decoded[0] - decoded[1]).abs().max() < 0.01 * decoded[0].abs().max()
