"""Converted files, loaded by diffusers itself: every module of every part, with the changes of the source."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sdlora
from sdlora.base.checkpoint import MINI_FOLDER, find_base
from sdlora.cli import app
from sdlora.errors import LoraFileError
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


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8), (torch.float32, 24)])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 2.0), (4, 32.0), (4, 4.0), (3, 2.0), (7, 3.0)])
def test_a_reader_without_alphas_applies_the_right_strength(
    rank: int, alpha: float, dtype: torch.dtype, bits: int, to: str, tmp_path: Path
) -> None:
    """The product of the stored matrices alone is the change; back in kohya's names it is the same."""
    name = "unet.mid_block.attentions.0.proj_in"
    shape = find_base("mini").module_shapes()[name]
    change = low_rank(shape, rank, alpha)
    change = LowRank(down=change.down.to(dtype), up=change.up.to(dtype), alpha=alpha)
    files = {key: tmp_path / f"{key}.safetensors" for key in ("source", "there", "back")}
    write_lora(files["source"], {name: change}, {}, dtype=dtype)
    sdlora.convert(files["source"], files["there"], to=to, base="mini")
    sdlora.convert(files["there"], files["back"], to="kohya", base="mini")
    matrices = {key.split(".")[-2]: tensor.double() for key, tensor in load_file(files["there"]).items()}
    down, up = (matrices.get(old, matrices.get(new)) for old, new in (("down", "lora_A"), ("up", "lora_B")))
    assert down is not None
    assert up is not None
    assert torch.equal(down, change.down.double())
    exact = change.up.double() * alpha / rank
    # Half a unit of the last place, and a little for numbers below the normal ones.
    torch.testing.assert_close(up, exact, rtol=0 if rank == 4 else 1.001 * 2.0**-bits, atol=2.0**-25)
    (there,), (back,) = (read_lora(files[key]).modules.values() for key in ("there", "back"))
    assert there.alpha == back.alpha == rank
    weight = torch.zeros(shape, dtype=torch.float64)
    assert torch.equal(there.delta(weight), back.delta(weight))


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize(("alpha", "size"), [(1.0, 1e-3), (1.0, 3e-5), (1e4, 1e3)])
def test_a_scale_out_of_float16_s_range_is_in_both_matrices(alpha: float, size: float, to: str, tmp_path: Path) -> None:
    """Alpha 1 at rank 128, a default of kohya's GUI, would bring ``up`` below float16's normal numbers."""
    name = "unet.mid_block.attentions.0.proj_in"
    shape = find_base("mini").module_shapes()[name]
    change = low_rank(shape, 128, alpha)
    change = LowRank(down=change.down.half(), up=(size * change.up).half(), alpha=alpha)
    write_lora(tmp_path / "x.safetensors", {name: change}, {}, dtype=torch.float16, format=to)
    stored = load_file(tmp_path / "x.safetensors")
    matrices = {key.split(".")[-2]: tensor.double().flatten(1) for key, tensor in stored.items()}
    down, up = (matrices.get(old, matrices.get(new)) for old, new in (("down", "lora_A"), ("up", "lora_B")))
    expected = change.up.double().flatten(1) @ change.down.double().flatten(1) * (alpha / 128)
    # As close as two matrices of 11 bits are; with the scale in ``up`` alone 0.9 % and 29 % were lost.
    assert (up @ down - expected).norm() < 2.0**-11 * expected.norm()


def test_a_scale_that_overflows_is_refused(tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    down, up = torch.full((1, 128, 1, 1), 6e4), torch.full((128, 1, 1, 1), 6e4)
    shape = find_base("mini").module_shapes()[name]
    change = LowRank(down=down[:, : shape[1]], up=up[: shape[0]], alpha=1000.0)
    with pytest.raises(LoraFileError, match="alpha / rank = 1000 it is too large for float16; write float32"):
        write_lora(tmp_path / "x.safetensors", {name: change}, {}, dtype=torch.float16, format="peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_convert_says_which_programs_read_the_file(to: str, tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    change = low_rank(find_base("mini").module_shapes()[name], 2, 1.0)
    write_lora(tmp_path / "x.safetensors", {name: change}, {}, dtype=torch.float16)
    words = ["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors"), "--to", to, "--base", "mini"]
    said = CliRunner().invoke(app, words).output
    assert "read by" in said
    assert "diffusers" in said
    assert ("ComfyUI leaves out" in said) is (to == "peft")


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        ((torch.float8_e4m3fn, torch.float8_e4m3fn), "float16"),
        ((torch.float8_e5m2, torch.float16), "float16"),
        ((torch.float16, torch.bfloat16), "float32"),
        ((torch.bfloat16, torch.bfloat16), "bfloat16"),
    ],
)
def test_what_is_written_holds_all_numbers_of_the_source(
    stored: tuple[torch.dtype, torch.dtype], written: str, tmp_path: Path
) -> None:
    source, name = tmp_path / "x.safetensors", "unet.mid_block.attentions.0.proj_in"
    change = low_rank(find_base("mini").module_shapes()[name], 2, 2.0)
    key = f"lora_{name.replace('.', '_')}"
    tensors = {f"{key}.lora_down.weight": change.down.to(stored[0]), f"{key}.lora_up.weight": change.up.to(stored[1])}
    save_file(tensors, source)
    expected = formula(next(iter(read_lora(source).modules.values())))
    given: dict[str, Any] = {"base": "mini"}
    reports = [
        sdlora.convert(source, tmp_path / "peft.safetensors", to="peft", **given),
        sdlora.merge([source, source], tmp_path / "merged.safetensors", **given),
    ]
    sdlora.resize(source, tmp_path / "resized.safetensors", rank=2, **given)
    assert [report.dtype for report in reports] == [written] * 2
    for file, factor in (("peft", 1), ("merged", 2), ("resized", 1)):
        (found,) = read_lora(tmp_path / f"{file}.safetensors").modules.values()
        assert (formula(found) - factor * expected).norm() < 0.01 * expected.norm()


def test_whole_numbers_and_modules_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    source, name = tmp_path / "x.safetensors", "unet.mid_block.attentions.0.proj_in"
    change = low_rank(find_base("mini").module_shapes()[name], 2, 2.0)
    key = f"lora_{name.replace('.', '_')}"
    tensors = {f"{key}.lora_down.weight": change.down, f"{key}.lora_up.weight": change.up}
    save_file({role: tensor.to(torch.int8) for role, tensor in tensors.items()}, source)
    with pytest.raises(LoraFileError, match=rf"{key} holds int8 \(down\), expected floating-point numbers"):
        read_lora(source)
    again = {f"{name}.lora_A.weight": change.down.clone(), f"{name}.lora_B.weight": 2 * change.up}
    save_file(tensors | again, source)
    for use in (
        lambda: sdlora.generate("a fox", loras=source, steps=1),
        lambda: sdlora.convert(source, tmp_path / "y.safetensors", to="kohya", base="mini"),
    ):
        with pytest.raises(LoraFileError, match=rf"{key} and {name} are the same module; remove one of them"):
            use()
