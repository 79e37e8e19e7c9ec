"""The sample sheet of a run: generated on the base that the run loaded, and equal to what ``generate`` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

import sdlora
from sdlora.base import load
from sdlora.base.base import Base
from sdlora.errors import BaseModelError
from sdlora.generation.grid import LABEL_LINES, labelled_grid
from sdlora.lora.layers import LoraLinear
from sdlora.training import loop, sample_sheet, samples
from tests.conftest import write_images
from tests.tiny import tiny_pipeline
from tests.training_runs import config_for

PROMPTS = ["a red fox", "a tower"]


def counted_loads(monkeypatch: pytest.MonkeyPatch) -> list[Base]:
    """The bases that are loaded from here on, by any module."""
    loaded: list[Base] = []
    load_base = load.load_base

    def counting(*given: Any, **named: Any) -> Base:
        loaded.append(load_base(*given, **named))
        return loaded[-1]

    monkeypatch.setattr(load, "load_base", counting)
    monkeypatch.setattr(loop, "load_base", counting)
    return loaded


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_samples_are_generated_on_the_base_in_memory(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, output = tmp_path / "base", tmp_path / "x.safetensors"
    tiny_pipeline(family).save_pretrained(base)
    images = write_images(tmp_path / "images", 2)
    more = (
        "samples.prompts=['a red fox', 'a tower']",
        "train.seed=3",
        "train.gradient_checkpointing=true",
        "train.steps=4",
    )
    loaded = counted_loads(monkeypatch)
    report = sdlora.train(config_for(base, images, output, *more, "data.resolution=64"))
    assert len(loaded) == 1
    assert not any(isinstance(module, LoraLinear) for module in loaded[0].unet.modules())
    assert not loaded[0].unet.is_gradient_checkpointing

    prompts = [f"zorb, {prompt}" for prompt in PROMPTS]
    drawn = sdlora.generate(prompts, base=str(base), loras=[str(output)], seed=3)
    assert len(loaded) == 2
    assert report.samples == tmp_path / "x.samples.png"
    with Image.open(report.samples) as sheet:
        expected = labelled_grid([[image.image for image in drawn]], columns=prompts)
        assert ImageChops.difference(sheet, expected).getbbox() is None
        for x, image in enumerate(drawn):
            wide, high = image.image.size
            box = (x * (wide + 6), sheet.height - high, x * (wide + 6) + wide, sheet.height)
            assert ImageChops.difference(sheet.crop(box), image.image).getbbox() is None
            label = sheet.crop((box[0], 0, box[2], box[1])).convert("L")
            assert label.getextrema()[0] < 100
        recipes = sheet.info["parameters"].split("\n\n")
    # The thumbnail was added to the file after it was hashed for the sheet; the hash is over the tensors alone.
    assert recipes == [image.parameters for image in drawn]
    plain = sdlora.generate(prompts, base=str(base), seed=3)
    assert not torch.equal(plain[0].latents, drawn[0].latents)
    assert sdlora.inspect(output).metadata["modelspec.thumbnail"].startswith("data:image/")


def test_a_set_precision_is_that_of_the_samples(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = counted_loads(monkeypatch)
    output = tmp_path / "x.safetensors"
    more = ("samples.prompts=['a red fox']", "train.precision=bfloat16", "train.steps=2")
    report = sdlora.train(config_for(tiny_base, images, output, *more))
    (drawn,) = sdlora.generate(
        "zorb, a red fox", base=str(tiny_base), loras=[str(output)], seed=0, precision="bfloat16"
    )
    assert [base.dtype for base in loaded] == [torch.bfloat16] * 2
    assert report.samples is not None
    with Image.open(report.samples) as sheet:
        expected = labelled_grid([[drawn.image]], columns=["zorb, a red fox"])
        assert ImageChops.difference(sheet, expected).getbbox() is None


def test_where_a_gpu_trains_in_bfloat16_samples_are_made_in_float16(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged into bfloat16 is rounded away by half: the sheet would not show what the LoRA does."""

    def as_on_a_gpu(requested: str, device: object, *, unet_parameters: int, generating: bool) -> torch.dtype:
        assert (requested, generating) == ("auto", True)
        return torch.float16

    loaded = counted_loads(monkeypatch)
    monkeypatch.setattr(samples, "choose_precision", as_on_a_gpu)
    output = tmp_path / "x.safetensors"
    report = sdlora.train(config_for(tiny_base, images, output, "samples.prompts=['a fox']", "train.steps=2"))
    assert len(loaded) == 1
    places = {"unet": loaded[0].unet, "vae": loaded[0].vae, "text": loaded[0].text_encoders[0].model}
    found = {name: {parameter.dtype for parameter in model.parameters()} for name, model in places.items()}
    assert found == {"unet": {torch.float16}, "vae": {torch.float32}, "text": {torch.float16}}
    (drawn,) = sdlora.generate("zorb, a fox", base=str(tiny_base), loras=[str(output)], seed=0, precision="float16")
    assert report.samples is not None
    with Image.open(report.samples) as sheet:
        expected = labelled_grid([[drawn.image]], columns=["zorb, a fox"])
        assert ImageChops.difference(sheet, expected).getbbox() is None


def test_captions_are_the_prompts_where_none_are_set(tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    config = config_for(tiny_base, write_images(tmp_path / "images", 5), output, "train.steps=2")
    config = config.model_copy(update={"samples": config.samples.model_copy(update={"prompts": None})})
    report = sdlora.train(config)
    assert report.samples is not None
    with Image.open(report.samples) as sheet:
        recipes = sheet.info["parameters"].split("\n\n")
    assert [recipe.partition(" <lora:")[0] for recipe in recipes] == [f"zorb, a thing of kind {i}" for i in range(4)]


def test_a_long_prompt_is_wrapped_and_cut_to_the_width_of_its_image() -> None:
    images = [Image.new("RGB", (96, 32), colour) for colour in ("red", "blue")]
    long = labelled_grid([images], columns=["a tower " * 60, "w" * 300])
    short = labelled_grid([images], columns=["a", "b"])
    assert long.width == short.width == 2 * 96 + 6
    assert long.height - 32 == LABEL_LINES * (short.height - 32)
    above = long.height - 32
    assert long.crop((96, 0, 102, above)).getextrema() == ((255, 255),) * 3
    for x, image in enumerate(images):
        box = (x * 102, above, x * 102 + 96, above + 32)
        assert ImageChops.difference(long.crop(box), image).getbbox() is None


@pytest.mark.parametrize("fault", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    BaseModelError("tiny: the VAE produced NaN or Inf"),
    OSError(28, "No space left on device"),
])  # fmt: skip
def test_a_sheet_that_fails_is_a_warning_and_the_same_command_makes_it(
    fault: Exception, tiny_base: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "x.safetensors"
    config = config_for(tiny_base, images, output, "samples.prompts=['a red fox']", "train.steps=2")

    def fail(*_: Any, **__: Any) -> None:
        raise fault

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_sheet, "write_samples", fail)
        report = sdlora.train(config)
    assert report.samples is None
    assert report.result.loss is not None
    assert f"{output} is complete, but its samples were not drawn" in caplog.text
    assert "Tried to allocate" not in caplog.text
    report = sdlora.train(config)
    assert report.samples == tmp_path / "x.samples.png"
    assert report.result.loss is None
    (drawn,) = sdlora.generate("zorb, a red fox", base=str(tiny_base), loras=[str(output)], seed=0)
    with Image.open(report.samples) as sheet:
        expected = labelled_grid([[drawn.image]], columns=["zorb, a red fox"])
        assert ImageChops.difference(sheet, expected).getbbox() is None
    assert sdlora.train(config).samples is None
