"""The embedded base: a genuine Stable Diffusion 1.x checkpoint, small, open, and able to draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

import sdlora
from recipes.mini.art import article
from recipes.mini.fidelity import load_sheet
from sdlora.base.checkpoint import MINI_FOLDER
from tests.conftest import ROOT

REFERENCES = ROOT / "tests" / "references"
STYLES = ("noto", "fluent", "twemoji")


@pytest.fixture(scope="module")
def subjects() -> list[str]:
    return (REFERENCES / "subjects.txt").read_text().splitlines()


def test_weights_are_small_and_half_precision() -> None:
    files = sorted(MINI_FOLDER.rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) <= 50_000_000
    assert sdlora.inspect("mini").dtype == "float16"


def test_its_architecture_is_that_of_stable_diffusion_1() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MINI_FOLDER)
    assert pipe.vae.config["latent_channels"] == 4
    assert pipe.vae.config["scaling_factor"] == 0.18215
    assert 2 ** (len(pipe.vae.config["block_out_channels"]) - 1) == 8
    assert pipe.unet.config["cross_attention_dim"] == pipe.text_encoder.config.hidden_size
    assert pipe.tokenizer.model_max_length == 77
    assert pipe.scheduler.config["beta_schedule"] == "scaled_linear"
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    assert pipe.scheduler.config["rescale_betas_zero_snr"] is True
    parameters = sum(p.numel() for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters())
    assert 10e6 < parameters < 25e6


def test_no_path_of_the_machine_that_made_it_is_inside() -> None:
    for file in MINI_FOLDER.rglob("*.json"):
        assert "_name_or_path" not in file.read_text()


def test_the_same_image_as_the_diffusers_pipeline() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MINI_FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompt, generator = "a red apple, noto style, white background", torch.Generator("cpu").manual_seed(5)
    options = {"num_inference_steps": 8, "guidance_scale": 5.0, "generator": generator, "output_type": "latent"}
    reference = pipe(prompt, **options).images[0]
    image = sdlora.generate(prompt, seed=5, steps=8, precision="float32")[0]
    assert (image.latents - reference).abs().max() < 1e-3
    pipe.scheduler = DDIMScheduler(
        **{key: pipe.scheduler.config[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")},
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    reference = pipe(prompt, **options | {"generator": torch.Generator("cpu").manual_seed(5)}).images[0]
    image = sdlora.generate(prompt, seed=5, steps=8, sampler="ddim", precision="float32")[0]
    assert (image.latents - reference).abs().max() < 1e-3


def test_it_draws_what_the_prompt_says(subjects: list[str]) -> None:
    gallery = load_sheet(REFERENCES / "base.png", subjects)
    rng = np.random.default_rng(4)
    chosen = [(subjects[i], STYLES[k % 3]) for k, i in enumerate(rng.permutation(len(subjects))[:24])]
    prompts = [f"{article(subject)}, {style} style, white background" for subject, style in chosen]
    images = [image.image for image in sdlora.generate(prompts, seed=2)]
    assert gallery.fidelity(images, [subject for subject, _ in chosen]) >= 0.5
    assert gallery.chance < 0.01


def test_the_background_is_the_one_asked_for() -> None:
    prompts = [f"a heart, {color} background" for color in ("white", "yellow", "blue", "black", "navy")]
    corners = [np.asarray(image.image, np.float32)[:8, :8].mean((0, 1)) for image in sdlora.generate(prompts, seed=1)]
    white, yellow, blue, black, navy = corners
    assert white.min() > 235
    assert yellow[0] - yellow[2] > 40
    assert blue[2] - blue[0] > 30
    assert black.max() < 50
    assert navy[2] - navy[0] > 40
    assert navy[0] < 60


def test_the_card_states_licences_recipe_and_quality() -> None:
    card = (Path(MINI_FOLDER) / "README.md").read_text()
    for fact in ("Apache-2.0", "MIT", "CC BY 4.0", "1.2.9", "1.2.6", "1.2.5", "dB", "chance", "python -m recipes.mini"):
        assert fact in card


def test_sheet_of_references_holds_every_subject_in_every_style(subjects: list[str]) -> None:
    with Image.open(REFERENCES / "base.png") as sheet:
        size = sheet.size
    side = size[0] // len(subjects)
    assert size == (side * len(subjects), side * len(STYLES))
    assert len(subjects) >= 250
