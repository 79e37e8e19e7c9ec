"""``generate --from``: images of ours repeat to the pixel, and twenty hand-written recipes of A1111 are read as meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdlora
from sdlora.cli import app
from sdlora.formats.recipe import parse_recipe, tagged_prompt
from sdlora.generation.repeat import Repetition, repetition
from tests.test_generation import random_lora

RNG = "RNG: the noise was drawn on the GPU; here it is drawn on the CPU, so the seed means another image"
ROUNDED = "Sampler: the timesteps of dpm++2m are rounded here, as in diffusers"

# Text, prompt with tags, options, further values, and what is said to differ.
RECIPES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "of 2022": (
        "girl with an artist's beret, ((eyeshadow)), (coquettish)\nNegative prompt: ugly, (((deformed))), [blurry]\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b",
        "girl with an artist's beret, ((eyeshadow)), (coquettish)",
        {"negative": "ugly, (((deformed))), [blurry]", "steps": 20, "cfg": 7.0, "seed": 965400086, "size": (512, 512)},
        {"sampler": "euler-a", "schedule": "uniform"},
        (RNG,),
    ),
    "the schedule in the name": (
        "a fox\nSteps: 30, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 1, Size: 512x768, Model hash: 6ce0161689, "
        "Model: v1-5-pruned-emaonly, RNG: CPU, Version: v1.6.0",
        "a fox",
        {"negative": "", "steps": 30, "cfg": 6.5, "seed": 1, "size": (512, 768)},
        {"sampler": "dpm++2m", "schedule": "karras"},
        (ROUNDED,),
    ),
    "no schedule in the name, before 1.9": (
        "a fox\nSteps: 30, Sampler: DPM++ 2M, CFG scale: 6.5, Seed: 1, Size: 512x768, RNG: CPU, Version: v1.6.0",
        "a fox",
        {},
        {"sampler": "dpm++2m", "schedule": "uniform"},
        (ROUNDED,),
    ),
    "a field for the schedule": (
        "a fox\nSteps: 25, Sampler: DPM++ 2M SDE, Schedule type: Exponential, CFG scale: 5, Seed: 4294967294, "
        "Size: 1024x1024, Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Version: v1.9.4",
        "a fox",
        {"seed": 4294967294, "size": (1024, 1024)},
        {"sampler": "dpm++2m-sde", "schedule": "exponential"},
        (RNG,),
    ),
    "automatic is Karras": (
        "a fox\nSteps: 25, Sampler: DPM++ SDE, Schedule type: Automatic, CFG scale: 5, Seed: 3, Size: 512x512, RNG: CPU",
        "a fox",
        {},
        {"sampler": "dpm++sde", "schedule": "karras"},
        ("Sampler: A1111 draws the new noise of DPM++ SDE differently",),
    ),
    "automatic is uniform": (
        "a fox\nSteps: 25, Sampler: Euler, Schedule type: Automatic, CFG scale: 5, Seed: 3, Size: 512x512, RNG: CPU",
        "a fox",
        {},
        {"sampler": "euler", "schedule": "uniform"},
        (),
    ),
    "automatic is exponential": (
        "a fox\nSteps: 25, Sampler: DPM++ 3M SDE, Schedule type: Automatic, CFG scale: 5, Seed: 3, Size: 512x512",
        "a fox",
        {},
        {"sampler": "dpm++3m-sde", "schedule": "exponential"},
        ("Sampler: A1111 leaves out the last but one noise level of DPM++ 3M SDE; here it is taken", RNG),
    ),
    "prompts of several lines": (
        "a fox,\nin the snow\n\nat night\nNegative prompt: blue,\ngreen: no, really\nSteps: 20, Sampler: DDIM, "
        "CFG scale: 7, Seed: 5, Size: 512x512, RNG: CPU",
        "a fox,\nin the snow\n\nat night",
        {"negative": "blue,\ngreen: no, really"},
        {"sampler": "ddim", "schedule": None},
        (),
    ),
    "LoRAs with hashes": (
        "a fox <lora:zorb:0.8> <lora:add detail:0.5:1>\nNegative prompt: blue\nSteps: 20, Sampler: Euler a, "
        "Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x512, Model hash: 6ce0161689, Model: v1-5, RNG: CPU, "
        'Lora hashes: "zorb: 0123456789ab, add detail: ba9876543210", Version: v1.10.1',
        "a fox <lora:zorb:0.8> <lora:add detail:0.5:1>",
        {"negative": "blue"},
        {"sampler": "euler-a", "schedule": "karras", "loras": [("zorb", 0.8, 0.8), ("add detail", 1.0, 0.5)]},
        (),
    ),
    "textual inversions": (
        "a fox, easynegative\nSteps: 20, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 7, Seed: 5, Size: 512x512, "
        'RNG: CPU, TI hashes: "easynegative: c74b4e810b03", Version: v1.9.0',
        "a fox, easynegative",
        {},
        {"sampler": "euler", "schedule": "sgm-uniform"},
        (),
    ),
    "clip skip and ENSD": (
        "1girl\nNegative prompt: lowres\nSteps: 28, Sampler: Euler a, CFG scale: 12, Seed: 2870305590, Size: 512x512, "
        "Model hash: 925997e9, Clip skip: 2, ENSD: 31337, RNG: CPU",
        "1girl",
        {"cfg": 12.0, "seed": 2870305590},
        {"sampler": "euler-a", "schedule": "uniform", "clip_skip": 2},
        ("ENSD: 31337 is left out",),
    ),
    "a second pass": (
        "a fox\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x512, Denoising strength: 0.45, "
        "RNG: CPU, Hires upscale: 1.5, Hires steps: 12, Hires upscaler: Latent (nearest-exact), Version: v1.6.0",
        "a fox",
        {"hires": 1.5, "hires_steps": 12, "hires_strength": 0.45, "hires_upscaler": "latent-nearest-exact"},
        {"sampler": "dpm++2m", "schedule": "karras", "strength": None},
        (ROUNDED,),
    ),
    "a second pass to a size, with a model": (
        "a fox\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768, Denoising strength: 0.4, RNG: CPU, "
        "Hires resize: 1024x1536, Hires steps: 0, Hires upscaler: R-ESRGAN 4x+, Version: v1.6.0",
        "a fox",
        {"hires": 2.0, "hires_strength": 0.4, "hires_upscaler": "lanczos"},
        {"sampler": "euler-a", "hires_steps": None},
        ("Hires upscaler: R-ESRGAN 4x+ is not available here; lanczos is taken",),
    ),
    "over another image": (
        "a fox\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512, Denoising strength: 0.75, RNG: CPU, "
        "Mask blur: 8, Inpaint area: Only masked, Masked area padding: 32",
        "a fox",
        {"strength": 0.75, "mask_blur": 8},
        {"sampler": "euler-a", "hires": None},
        (
            "Inpaint area: Only masked is left out", "Masked area padding: 32 is left out",
            "Denoising strength: it was drawn over another image; name that image with --image",
        ),
    ),
    "a variation of a seed": (
        "a fox\nSteps: 20, Sampler: Heun, CFG scale: 7, Seed: 5, Size: 512x512, Variation seed: 99, "
        "Variation seed strength: 0.3, Seed resize from: 512x640, RNG: NV",
        "a fox",
        {"seed": 5},
        {"sampler": "heun", "schedule": "uniform"},
        (
            RNG.replace("GPU", "NV"), "Variation seed: 99 is left out", "Variation seed strength: 0.3 is left out",
            "Seed resize from: 512x640 is left out",
        ),
    ),
    "a sampler that is missing": (
        "a fox\nSteps: 20, Sampler: DPM adaptive, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x512, RNG: CPU",
        "a fox",
        {},
        {"sampler": "dpm++2m", "schedule": "karras"},
        ("Sampler: DPM adaptive is not available here; dpm++2m is taken", ROUNDED),
    ),
    "a variant that is missing": (
        "a fox\nSteps: 20, Sampler: DPM++ 2M SDE Heun Karras, CFG scale: 7, Seed: 5, Size: 512x512",
        "a fox",
        {},
        {"sampler": "dpm++2m-sde", "schedule": "karras"},
        ("Sampler: DPM++ 2M SDE Heun Karras is not available here; dpm++2m-sde is taken", RNG),
    ),
    "a schedule that is missing": (
        "a fox\nSteps: 20, Sampler: Euler a, Schedule type: Turbo, CFG scale: 7, Seed: 5, Size: 64x64, RNG: CPU",
        "a fox",
        {},
        {"sampler": "euler-a", "schedule": "uniform"},
        ("Schedule type: Turbo is not available here; that of A1111's Automatic is taken",),
    ),
    "a schedule that ends otherwise": (
        "a fox\nSteps: 20, Sampler: Euler a, Schedule type: Align Your Steps, CFG scale: 7, Seed: 5, Size: 64x64, RNG: CPU",
        "a fox",
        {},
        {"sampler": "euler-a", "schedule": "align-your-steps"},
        (
            "Schedule type: A1111's Align Your Steps has its last step at the lowest noise level; here it ends as published",
        ),
    ),
    "another that ends otherwise": (
        "a fox\nSteps: 20, Sampler: Euler, Schedule type: KL Optimal, CFG scale: 7, Seed: 5, Size: 64x64, RNG: CPU",
        "a fox",
        {},
        {"sampler": "euler", "schedule": "kl-optimal"},
        ("Schedule type: A1111's KL Optimal ends at the lowest noise level; here the last step ends at 0",),
    ),
    "of Forge": (
        "a fox\nNegative prompt: \nSteps: 8, Sampler: LCM, Schedule type: Automatic, CFG scale: 1.5, Seed: 5, "
        "Size: 1024x1024, Model: juggernaut, RNG: CPU, CFG Rescale φ: 0.7, "
        'Version: f2.0.1v1.10.1-previous-659-gc055f2d4, Module 1: "sdxl, vae"',
        "a fox",
        {"cfg": 1.5, "guidance_rescale": 0.7},
        {"sampler": "lcm", "schedule": None},
        ("Sampler: A1111 draws the new noise of LCM differently", "Module 1: sdxl, vae is left out"),
    ),
    "of an extension, with quotes": (
        "(a fox:1.2) in \"quotes\", it says: Steps: 3\nSteps: 20, Sampler: UniPC, CFG scale: 7, Seed: 5, Size: 512x512, "
        'RNG: CPU, ControlNet 0: "preprocessor: canny, model: control_v11p [d14c016b], weight: 1", Version: v1.6.0',
        "(a fox:1.2) in \"quotes\", it says: Steps: 3",
        {"steps": 20},
        {"sampler": "unipc", "schedule": None},
        (
            "Sampler: the timesteps of unipc are rounded here, as in diffusers",
            "ControlNet 0: preprocessor: canny, model: control_v11p [d14c016b], weight: 1 is left out",
        ),
    ),
}  # fmt: skip


def read(text: str) -> Repetition:
    return repetition(parse_recipe(text), tagged_prompt(text))


def test_there_are_twenty() -> None:
    assert len(RECIPES) >= 20


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_a1111_is_read_as_meant(name: str) -> None:
    text, prompt, options, further, notes = RECIPES[name]
    found = read(text)
    assert found.prompt == prompt
    assert {key: found.options.get(key) for key in options} == options
    loras = [(lora.name, lora.unet, lora.text_encoder) for lora in found.recipe.loras]
    values = {**found.options, "clip_skip": found.clip_skip, "loras": loras}
    assert {key: values.get(key) for key in further} == further
    assert found.notes == notes
    assert not found.is_ours


def test_faulty_values_are_named_and_left_out() -> None:
    found = read("a\nSteps: many, Sampler: Euler, CFG scale: x, Seed: 5, Size: big, RNG: CPU")
    assert not {"steps", "cfg", "size"} & set(found.options)
    assert found.notes == (
        "Steps: 'many' is not a number; it is left out", "CFG scale: 'x' is not a number; it is left out",
        "Size: 'big' is not WIDTHxHEIGHT; it is left out",
    )  # fmt: skip
    for seed in (-1, 2**32):
        found = read(f"a\nSteps: 1, Sampler: Euler, CFG scale: 5, Seed: {seed}, Size: 64x64, RNG: CPU")
        assert "seed" not in found.options
        assert found.notes == (f"Seed: {seed} is not from 0 to 4294967295; the seed is random",)


def run(*arguments: str) -> int:
    return app([*arguments], standalone_mode=False) or 0


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def parameters(file: Path) -> str:
    with Image.open(file) as image:
        return image.info["parameters"]


CASES: list[tuple[str, ...]] = [
    ("--steps", "3"),
    ("--sampler", "DPM++ 2M Karras", "--cfg", "3.25", "--negative", "blue,\ngreen", "--guidance-rescale", "0.7"),
    ("--sampler", "euler-a", "--schedule", "trailing", "--size", "64x96"),
    ("--sampler", "heun", "--schedule", "ddim"),
    ("--sampler", "dpm++sde", "--schedule", "exponential", "--clip-skip", "2"),
    ("--sampler", "lcm", "--cfg", "1"),
    ("--hires", "1.5", "--hires-strength", "0.6", "--hires-upscaler", "lanczos", "--hires-steps", "2"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case))
def test_an_image_of_ours_repeats_to_the_pixel(case: tuple[str, ...], tiny_base: Path, tmp_path: Path) -> None:
    first, again, note = tmp_path / "first.png", tmp_path / "again.png", tmp_path / "note.txt"
    steps = () if "--steps" in case else ("--steps", "4")
    run("generate", "a (red:1.2) fox, it is: big", "--base", str(tiny_base), "--out", str(first), *case, *steps)
    run("generate", "--from", str(first), "--base", str(tiny_base), "--out", str(again))
    assert np.array_equal(pixels(first), pixels(again))
    note.write_text(parameters(first), encoding="utf-8")
    run("generate", "--from", str(note), "--base", str(tiny_base), "--out", str(again))
    assert np.array_equal(pixels(first), pixels(again))
    assert parameters(again) == parameters(first)


def test_loras_are_found_in_their_folder(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    one = random_lora(tiny_base, folder / "one.safetensors", seed=1)
    first, again, bare = (tmp_path / f"{name}.png" for name in ("first", "again", "bare"))
    common = ("--base", str(tiny_base))
    run("generate", "a fox", *common, "--lora", f"{one}:0.7:0.4", "--steps", "2", "--seed", "3", "--out", str(first))
    run("generate", "a fox", *common, "--steps", "2", "--seed", "3", "--out", str(bare))
    run("generate", "--from", str(first), *common, "--lora-dir", str(folder), "--out", str(again))
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(bare))
    run("generate", "--from", str(first), *common, "--lora", f"{one}:0.7:0.4", "--out", str(again))
    assert np.array_equal(pixels(first), pixels(again))
    capsys.readouterr()
    code = app(["generate", "--from", str(first), *common, "--out", str(again)], standalone_mode=False)
    assert code == 1
    said = capsys.readouterr().err
    assert said == f"error: {first}: has the LoRAs one; name their folder with --lora-dir, or them with --lora\n"


def test_what_the_command_states_goes_before_the_recipe(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(RECIPES["the schedule in the name"][0].replace("512x768", "64x64"), encoding="utf-8")
    common = ("--base", str(tiny_base), "--steps", "2", "--out", str(tmp_path / "x.png"))
    run("generate", "--from", str(recipe), *common)
    assert "Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1," in parameters(
        tmp_path / "x.png"
    )
    said = capsys.readouterr().err
    assert "Model: it was made with v1-5-pruned-emaonly (6ce0161689); this is tiny" in said
    assert ROUNDED in said
    run("generate", "a dog", "--from", str(recipe), *common, "--sampler", "ddim", "--seed", "9")
    text = parameters(tmp_path / "x.png")
    assert text.startswith("a dog\nSteps: 2, Sampler: DDIM, CFG scale: 6.5, Seed: 9,")


def test_a_later_image_of_a_batch_repeats_too(tiny_base: Path, tmp_path: Path) -> None:
    sdlora_images = sdlora.generate("a fox", base=str(tiny_base), count=2, steps=2, seed=4)
    run(
        "generate",
        "a fox",
        "--base",
        str(tiny_base),
        "--count",
        "2",
        "--steps",
        "2",
        "--seed",
        "4",
        "--out",
        str(tmp_path),
    )
    second = sorted(tmp_path.glob("*.png"))[1]
    run("generate", "--from", str(second), "--base", str(tiny_base), "--out", str(tmp_path / "again.png"))
    difference = pixels(second).astype(int) - pixels(tmp_path / "again.png")
    assert np.array_equal(pixels(second), np.asarray(sdlora_images[1].image))
    # Convolutions of a batch of two may round otherwise than those of one image.
    assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--from", "nothing.png"), 1, "nothing.png: no such file"),
        (
            ("--from", "plain.png"),
            1,
            "plain.png: contains no recipe; expected the parameters of sdlora, A1111 or Forge",
        ),
        (("--from", "plain.txt"), 1, "plain.txt: contains no recipe"),
    ],
)
def test_faults(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("plain.txt").write_text("a fox", encoding="utf-8")
    assert app(["generate", *arguments], standalone_mode=False) == code
    assert message in capsys.readouterr().err


def test_the_answer_in_json_has_the_seed_of_the_recipe(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first.png"
    run("generate", "a fox", "--base", str(tiny_base), "--steps", "1", "--seed", "12", "--out", str(first))
    capsys.readouterr()
    run("generate", "--from", str(first), "--base", str(tiny_base), "--json", "--out", str(tmp_path / "again.png"))
    answer = json.loads(capsys.readouterr().out)
    assert (answer["seed"], answer["prompts"]) == (12, ["a fox"])


def test_a_strip_follows_sampler_and_schedule_and_refuses_a_recipe(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = random_lora(tiny_base, tmp_path / "one.safetensors", seed=1)
    common = ("generate", "a fox", "--base", str(tiny_base), "--lora", str(lora), "--strip", "--steps", "1")
    sheet = tmp_path / "strip.png"
    run(*common, "--sampler", "euler", "--schedule", "karras", "--guidance-rescale", "0.5", "--out", str(sheet))
    assert "Sampler: Euler, Schedule type: Karras, CFG scale: 5, CFG Rescale: 0.5," in parameters(sheet)
    with pytest.raises(SystemExit) as caught:
        app([*common, "--from", str(sheet)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "a strip" in said
    assert "--from" in said


def test_textual_inversions_are_asked_for(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(RECIPES["textual inversions"][0].replace("512x512", "64x64"), encoding="utf-8")
    run("generate", "--from", str(recipe), "--base", str(tiny_base), "--steps", "1", "--out", str(tmp_path / "x.png"))
    said = capsys.readouterr().err
    assert "TI hashes: it has the textual inversions easynegative; name their files with --embedding" in said
