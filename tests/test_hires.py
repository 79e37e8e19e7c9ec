"""The second pass against diffusers' two pipelines one after the other; recipes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from torch.nn.functional import interpolate

import sdlora
from sdlora.base.base import Base
from sdlora.base.checkpoint import find_base
from sdlora.cli import app
from sdlora.errors import SdloraError
from sdlora.formats.recipe import parse_recipe
from sdlora.generation.hires import UPSCALERS, Hires
from sdlora.generation.request import ImageRequest


def ours(base: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"negative": "blue", "seed": 7, "steps": 4, "cfg": 4.0, "precision": "float32"}
    return sdlora.generate("a red fox", base=base, sampler="euler", **(settings | options))[0]


def reference(base: Path, enlarge: Any, *, output: str, steps: int, strength: float) -> torch.Tensor:
    """diffusers' text to image, then its image to image on what ``enlarge`` made of the result."""
    first = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    first.scheduler = EulerDiscreteScheduler.from_config(first.scheduler.config)
    second = StableDiffusionImg2ImgPipeline(**first.components, requires_safety_checker=False)
    given: dict[str, Any] = {"negative_prompt": "blue", "guidance_scale": 4.0}
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)

    def seeded() -> torch.Generator:
        return torch.Generator("cpu").manual_seed(7)

    small = first("a red fox", num_inference_steps=4, generator=seeded(), output_type=output, **given).images
    return second(
        "a red fox", image=enlarge(small), num_inference_steps=steps, strength=strength, generator=seeded(),
        output_type="latent", **given,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize(
    ("upscaler", "options"),
    [
        ("latent", {"mode": "bilinear"}),
        ("Latent (bicubic antialiased)", {"mode": "bicubic", "antialias": True}),
        ("latent-nearest-exact", {"mode": "nearest-exact"}),
    ],
)
def test_enlarged_latents_are_drawn_over_as_diffusers_does(
    tiny_base: Path, upscaler: str, options: dict[str, Any]
) -> None:
    # A1111 takes all 4 steps: the last of int(4 / 0.7) = 5.
    expected = reference(
        tiny_base, lambda latents: interpolate(latents, (16, 16), **options), output="latent", steps=5, strength=0.801
    )
    made = ours(tiny_base, hires=2, hires_upscaler=upscaler)
    assert made.image.size == (128, 128)
    assert (made.latents - expected).abs().max() < 1e-4


def test_enlarged_pixels_are_drawn_over_as_diffusers_does(tiny_base: Path) -> None:
    expected = reference(
        tiny_base,
        lambda images: images[0].resize((96, 96), Image.Resampling.LANCZOS),
        output="pil",
        steps=6,
        strength=0.5,
    )
    made = ours(tiny_base, hires=1.5, hires_upscaler="lanczos", hires_strength=0.5, hires_steps=3)
    assert (made.latents - expected).abs().max() < 1e-4


def test_sizes_are_what_the_base_can_draw() -> None:
    assert Hires(scale=1.5).size((64, 80), 16) == (96, 112)
    # As A1111: 832 x 1216 times 1.6 in whole latents, which are no multiples of 64.
    base = find_base("mini")
    assert ImageRequest(prompt="", size=(832, 1216), hires=Hires(scale=1.6)).final_size_on(base) == (1328, 1944)
    assert Hires().schedule_steps(20) == 28
    assert Hires(strength=1).schedule_steps(20) == 20
    assert Hires(strength=0.5, steps=10).schedule_steps(20) == 20


def test_the_recipe_names_the_second_pass_as_a1111_does(tiny_base: Path) -> None:
    fields = parse_recipe(ours(tiny_base, hires=2, hires_steps=2, hires_upscaler="latent-bicubic").parameters).fields
    found = {name: fields[name] for name in fields if name.startswith(("Hires", "Denoising", "Size", "Steps"))}
    assert found == {
        "Steps": "4",
        "Size": "64x64",
        "Denoising strength": "0.7",
        "Hires upscale": "2",
        "Hires steps": "2",
        "Hires upscaler": "Latent (bicubic)",
    }
    assert "Hires steps" not in ours(tiny_base, hires=1.5).parameters
    assert len({upscaler.a1111_name for upscaler in UPSCALERS.values()}) == len(UPSCALERS)


def test_progress_counts_both_passes_and_images_stay_apart(tiny_base: Path) -> None:
    seen: list[Any] = []
    options: dict[str, Any] = {"base": tiny_base, "steps": 4, "hires": 1.5, "hires_steps": 2, "sampler": "euler-a"}
    both = sdlora.generate("a fox", seed=3, count=2, progress=sdlora.CallbackProgress(seen.append), **options)
    assert seen[-1].done == seen[-1].total == 12
    alone = sdlora.generate("a fox", seed=4, **options)[0]
    assert (both[1].latents - alone.latents).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hires": 1}, "above 1"),
        ({"hires_steps": 5}, "there is no second pass"),
        ({"hires": 2, "hires_upscaler": "ESRGAN"}, "unknown; choose one of latent, "),
        ({"hires": 2, "hires_strength": 0}, "above 0"),
        ({"hires": 2, "hires_strength": 0.001}, "would be the last of 4000"),
        ({"hires": 1.1}, "stays as it is in steps of 8 pixels"),
        ({"hires": 2, "image": Image.new("RGB", (64, 64))}, "second pass of text to image"),
    ],
)
def test_what_cannot_be_is_refused(tiny_base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SdloraError, match=message):
        ours(tiny_base, **options)


def test_the_command_makes_a_second_pass(tiny_base: Path, tmp_path: Path) -> None:
    given = ["--base", str(tiny_base), "--steps", "2", "--out", str(tmp_path / "made.png")]
    assert not app(["generate", "a fox", *given, "--hires", "2", "--hires-steps", "1"], standalone_mode=False)
    with Image.open(tmp_path / "made.png") as made:
        assert made.size == (128, 128)
        assert "Hires upscale: 2, Hires steps: 1, Hires upscaler: Latent" in made.info["parameters"]


def test_prompts_do_not_change_any_more_in_the_second_pass(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in A1111, whose shares of the steps end with the first pass."""
    seen: list[torch.Tensor] = []
    predict = Base.predict

    def watched(
        self: Base, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Any, sizes: torch.Tensor
    ) -> Any:
        seen.append(conditioning.context[-1])
        return predict(self, noisy, timesteps, conditioning, sizes)

    monkeypatch.setattr(Base, "predict", watched)
    sdlora.generate("a [fox:dog:0.5]", base=tiny_base, seed=1, steps=4, hires=1.5, hires_steps=2)
    assert [torch.equal(one, seen[0]) for one in seen] == [True] * 2 + [False] * 4
