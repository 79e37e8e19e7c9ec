"""The VAE: in strips as at once, one by one, and again where memory runs out."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import sdlora
from sdlora.base import decode, strips
from sdlora.base.decode import LatentDecoder, PixelEncoder
from sdlora.base.strips import decode_in_strips, encode_in_strips
from sdlora.cli.app import app
from sdlora.errors import BaseModelError, DeviceMemoryError, SdloraError
from sdlora.generation import images
from sdlora.generation.request import ImageRequest
from tests.tiny import opened

BOUND = 1e-5
"""Of a pixel in [0, 1]: a 400th of a step of 8 bits."""


@pytest.fixture(params=["mini", "sdxl"])
def base(request: pytest.FixtureRequest, tiny_files: dict[str, Path]) -> Any:
    return opened(tiny_files.get(request.param, "mini"))


@pytest.mark.parametrize("values", [2**23, 2**13, 1])
@torch.no_grad()
def test_strips_give_the_pixels_of_the_whole(base: Any, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to strips of one row, in a height that none divides."""
    latents = torch.randn(2, 4, 7, 5) * 4
    whole = base.vae.decode(latents).sample
    monkeypatch.setattr(strips, "STRIP_VALUES", values)
    assert (decode_in_strips(base.vae, latents) - whole).abs().max() < BOUND
    assert whole.abs().max() > 0.1


def test_no_layer_at_full_size_sees_more_than_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    base = opened("mini")
    seen: list[int] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen.append(given[0].numel())

    monkeypatch.setattr(strips, "STRIP_VALUES", 2**14)
    for block in base.vae.decoder.up_blocks:
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
    latents = torch.randn(1, 4, 32, 32)
    decode_in_strips(base.vae, latents)
    in_strips, seen = max(seen), []
    base.vae.decode(latents)
    # A strip has a row more above and below, and is four times as large once it is scaled up.
    assert in_strips <= 4 * (2**14 + 2 * 32 * 256)
    assert max(seen) > 10 * in_strips


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


def test_where_memory_runs_out_the_image_is_decoded_in_strips_with_one_warning(
    base: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    latents = torch.randn(2, 4, 8, 8)
    expected = LatentDecoder(base)(latents)
    monkeypatch.setattr(base.vae, "decode", out_of_memory)
    decoder = LatentDecoder(base)
    with caplog.at_level(logging.WARNING, "sdlora"):
        for _ in range(2):
            assert (decoder(latents) - expected).abs().max() < BOUND
    assert [record.getMessage() for record in caplog.records] == [
        "the cpu has too little memory to decode an image at once; it is decoded in strips, which takes longer"
    ]


def test_too_little_memory_for_strips_is_a_sentence(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode_in_strips", out_of_memory)
    with pytest.raises(
        DeviceMemoryError, match="to decode an image of 72 x 64 pixels, even in strips; choose a smaller"
    ):
        LatentDecoder(base, tiled=True)(torch.randn(1, 4, 8, 9))


def test_other_faults_are_not_taken_for_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base = opened("mini")

    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(base.vae, "decode", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        LatentDecoder(base)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(BaseModelError, match="the UNet produced NaN or Inf"):
        LatentDecoder(base)(torch.full((1, 4, 8, 8), torch.nan))


def test_off_the_cpu_images_are_decoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []

    def decoded(latents: Tensor) -> Any:
        together.append(latents.shape[0])
        return SimpleNamespace(sample=torch.zeros(latents.shape[0], 3, 8, 8))

    monkeypatch.setattr(decode, "check_finite", lambda *_: None)
    vae = SimpleNamespace(dtype=torch.float32, decode=decoded)
    base: Any = SimpleNamespace(vae=vae, checkpoint=SimpleNamespace(latent_scale=1.0, latent_factor=8))
    assert LatentDecoder(base)(torch.zeros(3, 4, 1, 1, device="meta")).shape == (3, 3, 8, 8)
    assert together == [1, 1, 1]
    LatentDecoder(base)(torch.zeros(3, 4, 1, 1))
    assert together == [1, 1, 1, 3]


def test_as_many_images_are_generated_together_as_memory_is_meant_to_hold() -> None:
    base: Any = SimpleNamespace(resolution=1024)
    for size, together in ((None, 1), ((512, 512), 4), ((768, 768), 1), ((704, 704), 2), ((128, 128), 4)):
        requests = [ImageRequest(prompt="x", seed=seed, size=size) for seed in range(4)]
        assert max(map(len, images._batches(requests, base))) == together


def test_tiling_when_asked_gives_the_same_image(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sdlora.generate("a fox", base=tiny_base, seed=1, steps=1)[0].image
    calls: list[int] = []

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return decode_in_strips(*given)

    monkeypatch.setattr(decode, "decode_in_strips", counted)
    (drawn,) = sdlora.generate("a fox", base=tiny_base, seed=1, steps=1, vae_tiling=True)
    assert calls == [1]
    difference = torch.tensor(list(drawn.image.tobytes())) - torch.tensor(list(expected.tobytes()))
    assert difference.abs().max() <= 1
    file = tmp_path / "x.png"
    given = ["generate", "a fox", "--base", str(tiny_base), "--seed", "1", "--steps", "1", "--vae-tiling"]
    result = CliRunner().invoke(app, [*given, "--out", str(file)])
    assert (result.exit_code, calls) == (0, [1, 1])
    with Image.open(file) as written:
        assert written.tobytes() == drawn.image.tobytes()


def latents_of(distribution: Any) -> Tensor:
    return torch.cat([distribution.mean, distribution.std], 1)


@pytest.mark.parametrize("values", [2**23, 2**13, 1])
@torch.no_grad()
def test_strips_give_the_latents_of_the_whole(base: Any, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to strips of two rows, in a height that none divides."""
    pixels = torch.rand(2, 3, 56, 40) * 2 - 1
    whole = latents_of(base.vae.encode(pixels).latent_dist)
    monkeypatch.setattr(strips, "STRIP_VALUES", values)
    found = latents_of(encode_in_strips(base.vae, pixels, torch.device("cpu")))
    assert found.shape == (2, 8, 7, 5)
    assert (found - whole).abs().max() < BOUND
    assert whole[:, :4].std() > 1e-3


def test_no_layer_of_the_encoder_at_full_size_sees_more_than_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    base = opened("mini")
    seen: list[int] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen.append(given[0].numel())

    monkeypatch.setattr(strips, "STRIP_VALUES", 2**14)
    for part in (base.vae.encoder.conv_in, *base.vae.encoder.down_blocks):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
    pixels = torch.zeros(1, 3, 256, 256)
    encode_in_strips(base.vae, pixels, torch.device("cpu"))
    in_strips, seen = max(seen), []
    base.vae.encode(pixels)
    # A strip has a row more above and below, or two below, at a width of 256 and up to 64 channels.
    assert in_strips <= 2**14 + 4 * 257 * 64
    assert max(seen) > 10 * in_strips


def test_where_memory_runs_out_an_image_is_encoded_in_strips_with_one_warning(
    base: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    expected = PixelEncoder(base)(pixels)
    monkeypatch.setattr(base.vae, "encode", out_of_memory)
    encoder = PixelEncoder(base)
    with caplog.at_level(logging.WARNING, "sdlora"):
        for _ in range(2):
            found = encoder(pixels)
            assert (found.mean - expected.mean).abs().max() < BOUND
            assert (found.std - expected.std).abs().max() < BOUND
    assert [record.getMessage() for record in caplog.records] == [
        "the cpu has too little memory to encode an image at once; it is encoded in strips, which takes longer"
    ]


def test_other_faults_of_the_encoder_are_not_taken_for_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base = opened("mini")
    with pytest.raises(BaseModelError, match="the VAE produced NaN or Inf"):
        PixelEncoder(base, tiled=True)(torch.full((1, 3, 64, 64), torch.nan))

    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(base.vae, "encode", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        PixelEncoder(base)(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("options", [{"mask": True}, {"hires": 2}])
def test_tiling_when_asked_encodes_in_strips_too(
    tiny_base: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images that are drawn over, and between two passes; the image stays the same."""
    values = torch.arange(64 * 64 * 3, dtype=torch.uint8).reshape(64, 64, 3).numpy()
    given: dict[str, Any] = {"base": tiny_base, "seed": 1, "steps": 2, "precision": "float32"}
    if "mask" in options:
        given |= {"image": Image.fromarray(values), "mask": Image.new("L", (64, 64), 255)}
    else:
        given |= {"hires": 2, "hires_upscaler": "lanczos", "size": 64}
    expected = sdlora.generate("a fox", **given)[0].latents
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return encode_in_strips(*arguments)

    monkeypatch.setattr(decode, "encode_in_strips", counted)
    found = sdlora.generate("a fox", vae_tiling=True, **given)[0].latents
    assert calls == [1]
    assert (found - expected).abs().max() < 1e-3


def test_as_many_images_are_drawn_together_as_asked(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    denoise = images.denoise

    def counted(base: Any, requests: Any, *more: Any, **options: Any) -> Tensor:
        together.append(len(requests))
        return denoise(base, requests, *more, **options)

    monkeypatch.setattr(images, "denoise", counted)
    given: dict[str, Any] = {"base": tiny_base, "seed": 1, "steps": 2, "size": 64, "count": 6, "precision": "float32"}
    made = {size: sdlora.generate("a fox", batch_size=size, **given) for size in (None, 1, 5, 9)}
    assert together == [4, 2, *[1] * 6, 5, 1, 6]
    for some in made.values():
        assert all((a.latents - b.latents).abs().max() < 1e-4 for a, b in zip(some, made[1], strict=True))
        assert [image.parameters for image in some] == [image.parameters for image in made[1]]
    for wrong in (0, 1.5, True):
        with pytest.raises(SdloraError, match=f"batch_size {wrong}: expected a whole number, at least 1"):
            sdlora.generate("a fox", batch_size=wrong, **given)
    together.clear()
    sdlora.generate_strip(["a fox", "an owl"], base=tiny_base, loras=[], steps=1, seed=1, batch_size=1)
    assert set(together) == {1}
    together.clear()
    command = ["generate", "a fox", "--base", str(tiny_base), "--steps", "1", "--count", "3", "--batch-size", "2"]
    assert CliRunner().invoke(app, [*command, "--out", str(tiny_base.parent / "together")]).exit_code == 0
    assert together == [2, 1]
    together.clear()
    command = ["grid", "a fox", "--base", str(tiny_base), "--steps", "1", "--x", "seed:1-3", "--batch-size", "2"]
    assert CliRunner().invoke(app, [*command, "--out", str(tiny_base.parent / "together.png")]).exit_code == 0
    assert together == [2, 1]
    with pytest.raises(SdloraError, match="batch_size 0: expected a whole number, at least 1"):
        sdlora.grid("a fox", base=tiny_base, x="seed:1-3", batch_size=0, out=tiny_base.parent / "together.png")
