"""Weights of parts, blocks and steps; tags in prompts; what is refused, in one line each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sdlora
from sdlora.errors import SdloraError
from sdlora.families import FAMILIES
from sdlora.formats.hashes import file_hashes
from sdlora.formats.weight_curve import WeightCurve
from sdlora.generation.blocks import LISTS, PRESETS, BlockWeights, blocks_of
from sdlora.generation.denoise import denoise
from sdlora.generation.lora_choice import LoraChoice
from sdlora.generation.loras import fit_loras
from sdlora.generation.request import ImageRequest
from sdlora.generation.scheduled_prompt import encode_requests
from sdlora.lora.stack import Stack
from sdlora.progress import Silence
from tests.test_generation import random_lora
from tests.tiny import opened

SMALL: dict[str, Any] = {"seed": 1, "steps": 2}


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library: ``style``, ``old`` (whose metadata call it ``by-alias``), and ``twin`` in two folders."""
    root = tmp_path_factory.mktemp("library")
    (root / "a").mkdir()
    (root / "b").mkdir()
    random_lora(tiny_base, root / "style.safetensors", seed=1)
    other = load_file(random_lora(tiny_base, root / "other.safetensors", seed=2))
    save_file(other, root / "old.safetensors", metadata={"ss_output_name": "by-alias"})
    (root / "other.safetensors").unlink()
    for name in ("a/twin", "b/twin"):
        save_file(other, root / f"{name}.safetensors", metadata={"modelspec.trigger_phrase": "zorb"})
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x.safetensors:0.5:lbw=MIDD", {"unet": 0.5, "text_encoder": 0.5, "blocks": BlockWeights(text="MIDD")}),
        ("x.safetensors:te=0.5:unet=-0.9", {"unet": -0.9, "text_encoder": 0.5}),
        ("x.safetensors:te=0.5", {"unet": 0.5, "text_encoder": 0.5}),
        ("x.safetensors:unet=0.5", {"unet": 0.5, "text_encoder": 1.0}),
        ("x.safetensors:start=5:stop=0.75", {"start": 5, "stop": 0.75}),
        ("x.safetensors:1:0:step=2-8", {"unet": 1.0, "text_encoder": 0.0, "start": 2, "stop": 8}),
        (
            "x.safetensors:0.5@0.25,1@1,-0.2@0:stop=9",
            {"text_encoder": -0.2, "stop": 9, "curve": WeightCurve(points=((0, -0.2), (0.25, 0.5), (1, 1)))},
        ),
        ("x.safetensors:te=0:unet=0@3;1@6", {"text_encoder": 0.0, "curve": WeightCurve(points=((3, 0), (6, 1)))}),
    ],
)
def test_what_follows_the_file_is_read(text: str, expected: dict[str, Any]) -> None:
    choice = LoraChoice.parse(text)
    assert choice == LoraChoice(file=Path("x.safetensors"), **expected)
    assert LoraChoice.parse(f"x.safetensors:{choice.tag}") == choice


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ("abc", "the weight after the colon is not a number"),
        ("unet=abc", "the weight after the colon is not a number"),
        ("11", "expected weights between -10 and 10"),
        ("te=nan", "expected weights between -10 and 10"),
        ("1:lbw=OUTAL", "lbw=OUTAL: expected one of ALL, NONE"),
        ("1:lbw=1,1,1", "or a list of 17 or 26 numbers"),
        ("1:start=late", "'late' is no step"),
        ("1:start=1.5", "start and stop are steps"),
        ("1:start=8:stop=3", "start 8 is not before stop 3"),
        ("1@0,11@1", "expected weights between -10 and 10"),
        ("1@0,x@1", "'x@1' is no weight at a step"),
        ("1@0,2@0", "1@0,2@0: expected different steps"),
        ("1:strength=3", "'strength=3' is unknown; expected weights, unet="),
    ],
)
def test_what_cannot_be_read_is_one_line(items: str, said: str) -> None:
    with pytest.raises(SdloraError, match=re.escape(said)) as caught:
        LoraChoice.parse(f"x.safetensors:{items}")
    assert str(caught.value).startswith(f"x.safetensors:{items}: ")
    assert len(str(caught.value).splitlines()) == 1


EXTENSION = """
INS:1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0
IND:1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0
INALL:1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0
MIDD:1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0
OUTD:1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0
OUTS:1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1
OUTALL:1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1
"""
"""The presets as the extension's own page lists them."""


def test_presets_are_those_of_the_extension() -> None:
    lists = dict(line.split(":") for line in EXTENSION.split())
    assert {*lists, "ALL", "NONE", "ALL0.5"} == set(PRESETS)
    for name, numbers in lists.items():
        assert BlockWeights(text=name).of(FAMILIES["sd1"]) == BlockWeights(text=numbers).of(FAMILIES["sd1"])
    for family, length in (("sd1", 26), ("sdxl", 20)):
        assert BlockWeights(text="ALL0.5").of(FAMILIES[family]) == dict.fromkeys(LISTS[length], 0.5)
    assert BlockWeights(text="MIDD").of(FAMILIES["sdxl"]) == {
        "BASE": 1.0, "IN04": 0.0, "IN05": 0.0, "IN07": 1.0, "IN08": 1.0, "M00": 1.0,
        "OUT00": 1.0, "OUT01": 1.0, "OUT02": 1.0, "OUT03": 0.0, "OUT04": 0.0, "OUT05": 0.0,
    }  # fmt: skip


def test_blocks_are_counted_as_in_the_original_checkpoint() -> None:
    """On the full layout of SD 1.x: two residual blocks in a level, four levels; written by hand."""
    levels = [f"unet.down_blocks.{n}.resnets.{m}.conv1" for n in range(4) for m in range(2)]
    levels += [f"unet.down_blocks.{n}.attentions.{m}.proj_in" for n in range(3) for m in range(2)]
    levels += [f"unet.down_blocks.{n}.downsamplers.0.conv" for n in range(3)]
    levels += [f"unet.up_blocks.{n}.resnets.{m}.conv1" for n in range(4) for m in range(3)]
    levels += [f"unet.up_blocks.{n}.attentions.{m}.proj_in" for n in (1, 2, 3) for m in range(3)]
    levels += [f"unet.up_blocks.{n}.upsamplers.0.conv" for n in range(3)]
    levels += ["unet.mid_block.attentions.0.proj_in", "unet.mid_block.resnets.0.conv1", "unet.conv_in"]
    levels += ["unet.time_embedding.linear_1", "unet.conv_out", "text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    found = blocks_of(levels)
    expected = {
        "unet.down_blocks.0.attentions.0.proj_in": "IN01",
        "unet.down_blocks.0.attentions.1.proj_in": "IN02",
        "unet.down_blocks.0.downsamplers.0.conv": "IN03",
        "unet.down_blocks.1.attentions.0.proj_in": "IN04",
        "unet.down_blocks.2.attentions.1.proj_in": "IN08",
        "unet.down_blocks.3.resnets.1.conv1": "IN11",
        "unet.mid_block.attentions.0.proj_in": "M00",
        "unet.up_blocks.0.resnets.0.conv1": "OUT00",
        "unet.up_blocks.0.upsamplers.0.conv": "OUT02",
        "unet.up_blocks.1.attentions.0.proj_in": "OUT03",
        "unet.up_blocks.3.attentions.2.proj_in": "OUT11",
        "unet.conv_in": "IN00",
        "unet.time_embedding.linear_1": "BASE",
        "unet.conv_out": "BASE",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": "BASE",
    }
    assert {name: found[name] for name in expected} == expected


def test_weights_of_blocks_multiply_those_of_the_parts(tiny_base: Path, folder: Path) -> None:
    base = opened(tiny_base)
    numbers = [0.5, *[0.25] * 6, 0.0, *[2.0] * 9]
    chosen = LoraChoice.parse(f"{folder}/style.safetensors:0.8:0.6:lbw={','.join(map(str, numbers))}")
    changes = fit_loras(base.checkpoint, [chosen])[0].changes()
    found = {
        name.partition(".transformer")[0].partition(".text_model")[0]: round(w, 6) for name, (_, w) in changes.items()
    }
    # The tiny base has one residual block in a level down, two in a level up.
    assert found == {
        "text_encoder": 0.3,
        "unet.down_blocks.0.attentions.0": 0.2,
        "unet.mid_block.attentions.0": 0.0,
        "unet.up_blocks.1.attentions.0": 0.0,
        "unet.up_blocks.1.attentions.1": 2 * 0.8,
    }
    with pytest.raises(SdloraError, match=r"lbw=1,1.*: has 12 numbers; Stable Diffusion 1.x has 17 blocks"):
        fit_loras(base.checkpoint, [LoraChoice.parse(f"{folder}/style.safetensors:1:lbw={','.join('1' * 12)}")])


@torch.no_grad()
def test_start_and_stop_are_merging_between_the_steps(tiny_base: Path, folder: Path) -> None:
    """Beside the layers, as one low-rank pair, against weights that are merged and restored."""
    base, steps = opened(tiny_base), 6
    file = folder / "style.safetensors"
    request = ImageRequest(prompt="a fox", steps=steps)
    (lora,) = fit_loras(base.checkpoint, [LoraChoice.parse(f"{file}:0.7:0")])
    stack = Stack(base.modules())
    expected = denoise(
        base, [request], encode_requests(base, [request]), Silence(),
        before_step=lambda step: stack.set([lora.changes()] if 2 <= step < 5 else []),
    )  # fmt: skip
    for window in (
        "0.7:0:start=2:stop=5",
        "0.7:0:step=2-5",
        "0.7:0:start=0.34:stop=0.84",
        "te=0:unet=0@1,0.7@2,0.7@4,0@5",
    ):
        (image,) = sdlora.generate("a fox", base=tiny_base, loras=f"{file}:{window}", steps=steps, seed=0)
        torch.testing.assert_close(image.latents, expected[0], rtol=1e-3, atol=1e-4)
    (whole,) = sdlora.generate("a fox", base=tiny_base, loras=f"{file}:0.7:0", steps=steps, seed=0)
    assert (whole.latents - expected[0]).abs().max() > 1e-2


@given(
    points=st.dictionaries(st.sampled_from([0, 0.25, 0.5, 1]), st.floats(-10, 10), min_size=1),
    step=st.integers(0, 29),
)
def test_a_curve_is_linear_between_its_moments(points: dict[float, float], step: int) -> None:
    """As the extension interpolates, by numpy; its last step is at 1."""
    text = ",".join(f"{weight!r}@{moment}" for moment, weight in points.items())
    moments = sorted(points)
    expected = np.interp(step / 29, moments, [points[moment] for moment in moments])
    assert WeightCurve.parse(text).at(step, 30) == pytest.approx(expected, abs=1e-9)


def test_a_curve_counts_steps_where_a_moment_is_above_1() -> None:
    """The extension's own example values."""
    curve = WeightCurve.parse("0.75@0;0.5@3;1@6")
    assert [curve.at(step, 30) for step in (0, 3, 6, 9)] == [0.75, 0.5, 1.0, 1.0]
    assert WeightCurve.parse("0.5@5,1.0@10").at(8, 30) == pytest.approx(0.8)


def test_tags_find_files_and_leave_the_prompt(tiny_base: Path, folder: Path) -> None:
    digest = file_hashes(folder / "style.safetensors").autov3
    tags = {
        "<lora:style:0.8>": "style.safetensors:0.8",
        f"<lora:{digest}:0.8>": "style.safetensors:0.8",
        "<lora:by-alias:te=0.5:unet=0.9>": "old.safetensors:0.9:0.5",
        "<lora:a/twin:1:0.5>": "a/twin.safetensors:0.5:1",
        "<lora:STYLE:-0.5:lbw=INALL>": "style.safetensors:-0.5:lbw=INALL",
        "<lora:style:te=0.5:unet=0@0,1@1>": "style.safetensors:te=0.5:unet=0@0,1@1",
    }
    with sdlora.open(tiny_base, lora_dir=folder) as studio:
        made = studio.generate([f"a fox {tag} at night" for tag in tags], **SMALL)
        for (tag, option), image in zip(tags.items(), made, strict=True):
            (expected,) = studio.generate("a fox at night", loras=f"{folder}/{option}", **SMALL)
            # Images of the same LoRAs are generated together, which rounds otherwise.
            torch.testing.assert_close(image.latents, expected.latents, rtol=1e-3, atol=1e-3, msg=tag)
            assert image.parameters == expected.parameters
            assert image.request.prompt == "a fox at night"
        assert "<lora:old:te=0.5:unet=0.9>" in made[2].parameters
        (both,) = studio.generate("a fox <lora:style:1>", loras=folder / "old.safetensors", **SMALL)
        files = [folder / "old.safetensors", folder / "style.safetensors"]
        assert torch.equal(both.latents, studio.generate("a fox", loras=files, **SMALL)[0].latents)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            "a <lora:styl:1>",
            "prompt: <lora:styl:1>: styl: no LoRA of this name or hash in LIBRARY; did you mean style?",
        ),
        ("a <lora:twin:1>", "twin is the name of 2 files in LIBRARY: a/twin.safetensors and b/twin.safetensors; name"),
        ("a <lora:style:abc>", "prompt: <lora:style:abc>: 'abc' is not a weight; expected a number"),
        (
            "a <lora:style:1:lwb=OUTALL>",
            "prompt: <lora:style:1:lwb=OUTALL>: 'lwb=OUTALL' is unknown; expected weights, un",
        ),
        (
            "a <lora:style:1:1:IND>",
            "prompt: <lora:style:1:1:IND>: 'IND' is unknown; expected weights, unet=, te=, lbw=",
        ),
        ("a <lora:style:1:1:1>", "prompt: <lora:style:1:1:1>: '1' is unknown; expected weights, unet=, te=, lbw="),
        ("a <lora:style:11>", "prompt: <lora:style:11>: expected weights between -10 and 10"),
        ("a <lora:style:1> <lora:style:0.5>", "style.safetensors: is named more than once; name it once"),
        ("a <hypernet:style:1>", "hypernetworks are not supported"),
    ],
)
def test_faulty_tags_are_one_line_each_and_nothing_is_changed(
    prompt: str, said: str, tiny_base: Path, folder: Path
) -> None:
    with sdlora.open(tiny_base, lora_dir=folder) as studio:
        with pytest.raises(SdloraError) as caught:
            studio.generate([prompt, "a fox"], **SMALL)
        assert studio._base is None
    assert len(caught.value.problems) == 1
    assert said in str(caught.value).replace(str(folder), "LIBRARY")


def test_missing_files_and_folders_are_named(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(SdloraError, match="nowhere: no such folder of LoRAs"):
        sdlora.generate("a fox", base=tiny_base, lora_dir=tmp_path / "nowhere", **SMALL)
    with pytest.raises(SdloraError, match=r"none\.safetensors: no such file"):
        sdlora.generate("a fox", base=tiny_base, loras=tmp_path / "none.safetensors", **SMALL)


def test_a_file_with_nan_is_refused_whole(tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "style.safetensors")
    name = next(name for name in tensors if "attn2_to_k" in name and "up" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(SdloraError, match=r"bad\.safetensors: 1 of its \d+ modules hold NaN or infinity, .*attn2_to_k"):
        sdlora.generate("a fox", base=tiny_base, loras=[tmp_path / "bad.safetensors"], **SMALL)


def test_trigger_words_that_a_prompt_lacks_are_suggested(tiny_base: Path, folder: Path) -> None:
    said: list[str] = []
    file = folder / "a" / "twin.safetensors"
    sdlora.generate(["a fox", "ZORB, a fox"], base=tiny_base, loras=file, say=said.append, **SMALL)
    assert [line for line in said if "trigger" in line] == [f"{file}: its trigger word is not in the prompt: zorb"]


def test_what_has_no_effect_is_said(tiny_base: Path, folder: Path) -> None:
    def said(*tags: str, **options: Any) -> list[str]:
        lines: list[str] = []
        given = {"base": tiny_base, "lora_dir": folder, "say": lines.append, "negative": "blue", "count": 2}
        sdlora.generate([f"a fox {tag}" for tag in tags], **SMALL | given | options)
        return [line for line in lines if "memory" not in line]

    late = [f"{folder / 'style.safetensors'}: the UNet is not changed in any of 2 steps: 1:start=2"]
    assert said("<lora:style:1:start=2>", "<lora:style:1:start=1>", "<lora:style:0@0,1@1>", steps=2) == late
    # The second pass has steps enough.
    assert said("<lora:style:1:start=2>", steps=2, hires=2, hires_steps=3) == []
    assert said("", cfg=1) == ["cfg 1 switches guidance off: the negative prompt has no effect"]
    # Several parts are predicted with the negative prompt at any guidance.
    assert said("AND snow", cfg=1) == said("", cfg=1, negative="") == []
