"""The shipped path teaches a style, and the style is tied to the LoRA: measured on subjects no training image shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import sdlora
from recipes.mini.art import article
from recipes.mini.fidelity import load_sheet
from sdlora.base.checkpoint import MINI_FOLDER
from sdlora.generation.images import GeneratedImage
from tests.conftest import ROOT
from tests.measures import MEASURES, THRESHOLDS, TRIGGERS, unseen_subjects

SEEDS = 2


@pytest.fixture(scope="module")
def subjects() -> list[str]:
    return unseen_subjects()


@pytest.fixture(scope="module")
def loras(quickstart) -> dict[str, Path]:
    """Both styles, as the quickstart trains them."""
    files = [Path(file) for file in json.loads(quickstart.stdout)["loras"]]
    return {file.stem: file for file in files}


def test_quickstart_leaves_two_loras_and_the_strip(quickstart) -> None:
    assert quickstart.returncode == 0, quickstart.stderr
    report = json.loads(quickstart.stdout)
    assert [Path(file).name for file in report["loras"]] == ["blueprint.safetensors", "pixel.safetensors"]
    assert all(Path(file).stat().st_size > 500_000 for file in report["loras"])
    with Image.open(report["strip"]) as strip:
        assert strip.width > 6 * 256
        assert strip.text["parameters"].count("Steps: ") == 18  # ty: ignore[unresolved-attribute]
    assert [command.split()[1] for command in report["commands"]] == [
        "train",
        "train",
        "generate",
        "inspect",
        "inspect",
    ]
    assert all(f"$ {command}" in quickstart.stderr for command in report["commands"])


def draw(subjects: list[str], trigger: str, choices: list[str]) -> list[GeneratedImage]:
    prompts = [f"{trigger}, {article(subject)}" for subject in subjects]
    return sdlora.generate(prompts, loras=choices, seed=11, count=SEEDS)


def measured(style: str, images: list[GeneratedImage]) -> np.ndarray:
    return np.array([MEASURES[style](image.image) for image in images])


@pytest.mark.parametrize("style", TRIGGERS)
def test_the_style_comes_with_the_lora_and_grows_with_its_weight(
    style: str, loras: dict[str, Path], subjects: list[str]
) -> None:
    without, half, full = (
        draw(subjects, TRIGGERS[style], [f"{loras[style]}:{weight}"] if weight else []) for weight in (0, 0.5, 1.0)
    )
    assert (measured(style, full) > THRESHOLDS[style]).sum() >= 10 * SEEDS
    assert (measured(style, without) > THRESHOLDS[style]).sum() <= 2 * SEEDS
    assert measured(style, without).mean() < measured(style, half).mean() < measured(style, full).mean()

    # By shapes alone: colours are what a style replaces.
    references = ROOT / "tests" / "references"
    every = (references / "subjects.txt").read_text().splitlines()
    gallery = load_sheet(references / "base.png", every, colour=False)
    asked = [subject for subject in subjects for _ in range(SEEDS)]
    before, after = (gallery.fidelity([image.image for image in p], asked) for p in (without, full))
    assert before >= 0.5
    assert after >= before * 2 / 3


def test_both_styles_show_when_both_are_stacked(loras: dict[str, Path], subjects: list[str]) -> None:
    trigger = ", ".join(TRIGGERS.values())
    without = draw(subjects, trigger, [])
    both = draw(subjects, trigger, [f"{file}:0.8" for file in loras.values()])
    for style in TRIGGERS:
        assert (measured(style, both) > measured(style, without)).sum() >= 10 * SEEDS


@pytest.mark.filterwarnings("ignore")
def test_diffusers_draws_the_same_images_from_the_files(loras: dict[str, Path]) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MINI_FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name, file in loras.items():
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    for weights in ({"blueprint": 1.0}, {"blueprint": 0.7, "pixel": 0.5}):
        pipe.set_adapters(list(weights), list(weights.values()))
        reference = pipe(
            "blupaper, pixgrid, a fox", num_inference_steps=10, guidance_scale=5.0, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(3),
        ).images[0]  # fmt: skip
        choices = [f"{loras[name]}:{weight}" for name, weight in weights.items()]
        options = {"seed": 3, "steps": 10, "precision": "float32"}
        (image,) = sdlora.generate("blupaper, pixgrid, a fox", loras=choices, **options)  # ty: ignore[invalid-argument-type]
        assert (image.latents - reference).abs().max() < 1e-3
