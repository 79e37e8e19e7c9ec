"""Converted files, loaded by diffusers itself: every module of every part, with the changes of the source."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import sdlora
from sdlora.base.checkpoint import MINI_FOLDER, find_base
from sdlora.families import FAMILIES, LORA_PARTS, SD1
from sdlora.formats.keys import resolve
from sdlora.formats.lora_file import read_lora
from sdlora.formats.lora_writer import write_lora
from sdlora.lora.low_rank import LowRank
from tests.test_lora_formats import ATTENTION, KOHYA_DEFAULT, low_rank
from tests.tiny import write_tiny_ldm

pytestmark = pytest.mark.filterwarnings("ignore")


def loaded_changes(pipe: Any) -> dict[str, torch.Tensor]:
    """Canonical name -> (out, in · kh · kw), of every module that PEFT has changed in a pipeline."""
    found = {}
    for part in LORA_PARTS:
        for path, module in getattr(pipe, part, torch.nn.Module()).named_modules():
            if hasattr(module, "lora_A"):
                path = path if part == "unet" or path.startswith("text_") else f"text_model.{path}"
                found[f"{part}.{path}"] = module.get_delta_weight("x").double().flatten(1)
    return found


def formula(change: LowRank) -> torch.Tensor:
    return change.up.double().flatten(1) @ change.down.double().flatten(1) * (change.alpha / change.down.shape[0])


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_diffusers_loads_every_part_of_a_converted_file(family: str, to: str, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    pipe = write_tiny_ldm(base, family)
    shapes, rng = find_base(str(base)).module_shapes(), random.Random(0)
    changes = {
        name: low_rank(shape, rng.choice([2, 4, 4]), rng.choice([1.0, 3.0, 4.0]))
        for name, shape in shapes.items()
        if re.search(KOHYA_DEFAULT, name)
    }
    parts = {name.partition(".")[0] for name in changes}
    assert parts == {"unet", *(encoder.part for encoder in FAMILIES[family].text_encoders)}
    facts: dict[str, Any] = {"family": FAMILIES[family], "base_modules": shapes, "dtype": torch.float32}
    write_lora(tmp_path / "kohya.safetensors", changes, {}, **facts)
    sdlora.convert(tmp_path / "kohya.safetensors", tmp_path / "x.safetensors", to=to, base=str(base))
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="x")
    loaded = loaded_changes(pipe)
    assert loaded.keys() == changes.keys()
    for name, change in changes.items():
        torch.testing.assert_close(loaded[name], formula(change), rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_diffusers_draws_on_mini_what_we_draw(to: str, tmp_path: Path) -> None:
    """With a LoRA of the sizes of the default settings: attention of the UNet and the text encoder, rank 16, alpha 8."""
    shapes = find_base("mini").module_shapes()
    changes = {name: low_rank(shape, 16, 8.0) for name, shape in shapes.items() if re.search(ATTENTION, name)}
    changes = {n: LowRank(down=c.down, up=c.up / 8, alpha=c.alpha) for n, c in changes.items()}
    source = tmp_path / "kohya.safetensors"
    write_lora(source, changes, {}, dtype=torch.float32, family=SD1, base_modules=shapes)
    sdlora.convert(source, tmp_path / "x.safetensors", to=to, base="mini")
    pipe = StableDiffusionPipeline.from_pretrained(MINI_FOLDER, safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    words = pipe.tokenizer("a red fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
    without = pipe.text_encoder(words)[0]
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="x")
    again = read_lora(tmp_path / "x.safetensors")
    assert len(loaded_changes(pipe)) == len(again.modules) == len(changes)
    assert resolve(again.modules, shapes).unmatched == ()
    heard = pipe.text_encoder(words)[0]
    pipe.unload_lora_weights()
    encoder = dict(pipe.text_encoder.named_modules())
    for name, change in changes.items():
        if name.startswith("text_encoder."):
            encoder[name.removeprefix("text_encoder.text_model.")].weight.data += formula(change).float()
    assert (heard - pipe.text_encoder(words)[0]).abs().max() < 1e-3 < (heard - without).abs().max()
    pipe = StableDiffusionPipeline.from_pretrained(MINI_FOLDER, safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    (ours,) = sdlora.generate("a red fox", loras=[str(source)], seed=3, steps=4, cfg=5.0, precision="float32")
    generator = torch.Generator().manual_seed(3)
    drawn = pipe("a red fox", generator=generator, guidance_scale=5.0, num_inference_steps=4, output_type="latent")
    assert (ours.latents - drawn.images[0]).abs().max() < 1e-3
