"""``inspect`` of images: recipes as A1111 writes them, into PNG and into EXIF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from sdlora.cli import app
from sdlora.errors import DataError
from sdlora.tools.inspect import inspect

RECIPE = "a fox, é <lora:x:1>\nNegative prompt: blurry\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 64x48"


def test_a_png_shows_its_recipe(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", RECIPE)
    Image.new("RGB", (64, 48)).save(tmp_path / "x.png", pnginfo=text)
    report = inspect(tmp_path / "x.png")
    assert (report.kind, report.metadata["parameters"]) == ("image", RECIPE)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "x.png")]).stdout
    assert shown.splitlines() == ["x.png: image, PNG, 64 x 48 pixels", *(f"  {line}" for line in RECIPE.splitlines())]


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_exif_shows_its_recipe(tmp_path: Path, ending: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + RECIPE.encode("utf-16-be")
    Image.new("RGB", (64, 48)).save(tmp_path / f"x.{ending}", exif=exif)
    assert inspect(tmp_path / f"x.{ending}").metadata["parameters"] == RECIPE


def test_an_image_without_a_recipe_and_what_is_no_image(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert "it contains no recipe" in inspect(tmp_path / "x.png").notes[0]
    (tmp_path / "y.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"y\.png: cannot be read as an image"):
        inspect(tmp_path / "y.png")
    with pytest.raises(DataError, match=r"z\.png: no such file"):
        inspect(tmp_path / "z.png")


def test_weights_of_both_notations_are_shown_and_given_as_options(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    tags = "<lora:a:0.25:0.5> <lora:b:te=0.25:unet=0.5> <lora:c:0.7> <lora:d:much>"
    text.add_itxt("parameters", f"a fox {tags}\nSteps: 20, Sampler: DDIM, CFG scale: 7")
    Image.new("RGB", (64, 48)).save(tmp_path / "x.png", pnginfo=text)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "x.png")]).stdout.splitlines()
    assert shown[-3:] == [
        "  note: a: UNet 0.5, text encoder 0.25 (--lora a.safetensors:0.5:0.25)",
        "  note: b: UNet 0.5, text encoder 0.25 (--lora b.safetensors:0.5:0.25)",
        "  problem: <lora:d:much>: 'much' is not a weight; expected a number",
    ]
    found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "x.png"), "--json"]).stdout)["recipe"]
    assert found["prompt"] == "a fox"
    assert [(lora["name"], lora["unet"], lora["text_encoder"]) for lora in found["loras"]] == [
        ("a", 0.5, 0.25), ("b", 0.5, 0.25), ("c", 0.7, 0.7),
    ]  # fmt: skip
    assert found["fields"] == {"Steps": "20", "Sampler": "DDIM", "CFG scale": "7"}
