"""Image to image and inpainting against diffusers' own pipelines; masks, sizes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

import sdlora
from sdlora.cli import app
from sdlora.errors import SdloraError
from sdlora.formats.recipe import parse_recipe
from sdlora.generation.denoise import denoise
from tests.tiny import tiny_pipeline

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}),
}


def photo(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def white_box(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def reference(kind: Any, base: Path, sampler: str, **options: Any) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    pipe = kind(**pipe.components, requires_safety_checker=False)
    scheduler, more = SCHEDULERS[sampler]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red fox", negative_prompt="blue", num_inference_steps=5, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(7), **options,
    ).images[0]  # fmt: skip


def ours(base: Path, sampler: str = "ddim", *, prompt: str = "a red fox", **options: Any) -> Any:
    settings = {"negative": "blue", "seed": 7, "steps": 5, "cfg": 4.0, "precision": "float32"} | options
    return sdlora.generate(prompt, base=base, sampler=sampler, **settings)[0]


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_equals_diffusers(tiny_base: Path, sampler: str, strength: float) -> None:
    expected = reference(StableDiffusionImg2ImgPipeline, tiny_base, sampler, image=photo(), strength=strength)
    made = ours(tiny_base, sampler, image=photo(), strength=strength)
    assert (made.latents - expected).abs().max() < 1e-4
    assert f"Denoising strength: {strength:g}," in made.parameters


def test_image_to_image_of_sdxl_equals_diffusers(tiny_files: dict[str, Path]) -> None:
    pipe: Any = StableDiffusionXLImg2ImgPipeline(**tiny_pipeline("sdxl").components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a red fox", image=photo(), negative_prompt="blue", num_inference_steps=5, guidance_scale=4.0, strength=0.6,
        output_type="latent", generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip
    made = ours(tiny_files["sdxl"], "euler", image=photo(), strength=0.6)
    assert (made.latents - expected).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", ["dpm++2m", "euler", "ddim"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_equals_diffusers(tiny_base: Path, sampler: str, strength: float) -> None:
    mask = white_box((64, 64), (16, 24, 48, 64))
    given = {"image": photo(), "strength": strength}
    expected = reference(
        StableDiffusionInpaintPipeline, tiny_base, sampler, mask_image=mask, height=64, width=64, **given
    )
    made = ours(tiny_base, sampler, mask=mask, **given)
    assert (made.latents - expected).abs().max() < 1e-4


def test_unmasked_pixels_stay_and_a_blurred_edge_is_mixed(tiny_base: Path) -> None:
    image, mask = photo(), white_box((64, 64), (20, 20, 41, 41))
    hard = np.asarray(ours(tiny_base, image=image, mask=mask, mask_blur=0).image, int)
    soft = ours(tiny_base, image=image, mask=mask)
    before, white = np.asarray(image, int), np.asarray(mask) > 0
    assert (hard[~white] == before[~white]).all()
    assert (hard[white] != before[white]).any(-1).mean() > 0.9
    blurred = np.asarray(soft.image, int)
    assert (blurred[:6] == before[:6]).all()
    assert (abs(blurred - hard)[30, 30] <= 1).all()
    assert (blurred[19, 20:41] != before[19, 20:41]).any()
    assert ", Mask blur: 4" in soft.parameters


def test_every_cell_with_a_white_pixel_is_repainted(tiny_base: Path) -> None:
    """A line of one pixel would fall between the samples of diffusers' nearest neighbours, and nothing would change."""
    mask = white_box((64, 64), (0, 29, 64, 30))
    image = photo()
    made = np.asarray(ours(tiny_base, image=image, mask=mask, mask_blur=0).image)
    assert (made[29] != np.asarray(image)[29]).any(-1).mean() > 0.9


def test_two_images_of_one_call_are_those_of_two_calls(tiny_base: Path) -> None:
    options = {"base": tiny_base, "image": photo(), "strength": 0.6, "steps": 5, "sampler": "euler-a"}
    both = sdlora.generate("a fox", seed=3, count=2, mask=white_box((64, 64), (0, 0, 32, 64)), **options)
    alone = sdlora.generate("a fox", seed=4, mask=white_box((64, 64), (0, 0, 32, 64)), **options)
    assert (both[1].latents - alone[0].latents).abs().max() < 1e-4
    assert (both[0].latents - both[1].latents).abs().max() > 0.1


def test_images_that_do_not_fit_together_are_the_same_one_by_one(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(base: Any, requests: Any, *more: Any, **options: Any) -> torch.Tensor:
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(base, requests, *more, **options)

    options: Any = {"base": tiny_base, "image": photo(), "mask": white_box((64, 64), (0, 0, 32, 64)), "count": 3}
    together = sdlora.generate("a fox", seed=3, steps=4, **options)
    monkeypatch.setattr("sdlora.generation.images.denoise", small)
    for one, other in zip(together, sdlora.generate("a fox", seed=3, steps=4, **options), strict=True):
        assert (one.latents - other.latents).abs().max() < 1e-4


def test_the_command_draws_over_a_file(tiny_base: Path, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    white_box((64, 64), (0, 0, 32, 64)).save(tmp_path / "mask.png")
    given = ["--base", tiny_base, "--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--mask-blur", 0]
    command = ["generate", "a fox", *given, "--steps", 4, "--strength", 0.5, "--out", tmp_path / "made.png"]
    assert not app([str(word) for word in command], standalone_mode=False)
    with Image.open(tmp_path / "made.png") as made:
        assert "Denoising strength: 0.5" in made.info["parameters"]
        assert (np.asarray(made)[:, 32:] == np.asarray(photo())[:, 32:]).all()


def test_the_size_is_that_of_the_image_unless_stated(tiny_base: Path) -> None:
    assert ours(tiny_base, image=photo(94, 64)).image.size == (88, 64)
    assert ours(tiny_base, image=photo(88, 64), size=(64, 96)).image.size == (64, 96)
    assert ours(tiny_base, image=photo(512, 256)).image.size == (176, 88)


def test_files_are_read_as_they_are_seen(tiny_base: Path, tmp_path: Path) -> None:
    """Upright, and with transparency on white."""
    sideways, exif = photo(96, 64), Image.Exif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "phone.png", exif=exif)
    made = ours(tiny_base, image=tmp_path / "phone.png", strength=0.3)
    upright = ours(tiny_base, image=sideways.transpose(Image.Transpose.ROTATE_270), strength=0.3)
    assert made.image.size == (64, 96)
    assert torch.equal(made.latents, upright.latents)
    Image.new("RGBA", (64, 64)).save(tmp_path / "clear.png")
    clear, white = (
        ours(tiny_base, image=image, strength=0.3)
        for image in (tmp_path / "clear.png", Image.new("RGB", (64, 64), "white"))
    )
    assert torch.equal(clear.latents, white.latents)


def test_progress_counts_the_steps_that_are_taken(tiny_base: Path) -> None:
    seen = []
    sdlora.generate(
        "a fox", base=tiny_base, image=photo(), strength=0.6, steps=10, progress=sdlora.CallbackProgress(seen.append)
    )
    assert seen[-1].done == seen[-1].total == 6


def test_the_recipe_is_read_back(tiny_base: Path) -> None:
    made = ours(tiny_base, image=photo(), strength=0.55)
    fields = parse_recipe(made.parameters).fields
    assert fields["Denoising strength"] == "0.55"
    assert "Mask blur" not in fields
    assert len(fields["Init image hash"]) == 32
    assert "Denoising strength" not in ours(tiny_base).parameters


def test_all_faults_are_named_at_once(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "not.png").write_text("text")
    with pytest.raises(SdloraError) as caught:
        ours(tiny_base, image=tmp_path / "none.png", mask=tmp_path / "not.png", strength=1.5, mask_blur=-1)
    assert len(caught.value.problems) == 4
    assert all(word in str(caught.value) for word in ("none.png", "not.png", "strength 1.5", "mask_blur -1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "no image to draw over"),
        ({"mask": Image.new("L", (8, 8), 255)}, "no image to draw over"),
        ({"image": photo(), "mask_blur": 3}, "there is no mask"),
        ({"image": photo(), "mask": photo(), "mask_blur": True}, "mask_blur True: expected pixels, a whole number"),
        ({"image": photo(), "strength": 0}, "above 0"),
        ({"image": photo(), "strength": 0.1}, "less than one step; use at least 10 steps"),
        ({"image": photo(), "mask": Image.new("L", (64, 64))}, "nothing in it is white"),
        ({"image": photo(), "mask": Image.new("L", (64, 32), 255)}, "64 x 32 pixels for an image of 64 x 64"),
        ({"image": 3}, "image is a int"),
    ],
)
def test_what_cannot_be_is_refused(tiny_base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SdloraError, match=message):
        ours(tiny_base, **options)


def test_shares_of_a_prompt_are_those_of_the_steps_that_are_taken(tiny_base: Path) -> None:
    options: dict[str, Any] = {"image": photo(), "strength": 0.5, "steps": 8}
    changing = [ours(tiny_base, prompt=f"a [fox:dog:{when}]", **options).latents for when in ("0.5", "2", "4")]
    assert torch.equal(changing[0], changing[1])
    assert torch.equal(changing[2], ours(tiny_base, prompt="a fox", **options).latents)
    assert (changing[0] - changing[2]).abs().max() > 1e-3


def test_too_little_memory_to_encode_is_one_line(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sdlora.base.decode.encode_pixels", full)
    monkeypatch.setattr("sdlora.base.decode.encode_in_strips", full)
    with pytest.raises(
        SdloraError, match="too little memory to encode an image of 80 x 64 pixels, even in strips; choose a"
    ):
        ours(tiny_base, image=photo(80, 64))
    with pytest.raises(SdloraError, match="too little memory to encode an image of 128 x 128 pixels"):
        ours(tiny_base, hires=2, hires_upscaler="lanczos")
