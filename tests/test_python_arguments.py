"""What callers from Python write: the sensible thing is done, the rest is refused with what was expected."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sdlora
from sdlora.errors import SdloraError
from tests.test_generation import random_lora

SMALL: dict[str, Any] = {"seed": 1, "steps": 1}


def test_paths_single_loras_and_square_sizes_are_read(tiny_base: Path, tmp_path: Path) -> None:
    file = random_lora(tiny_base, tmp_path / "x.safetensors", seed=1)
    given: list[Any] = [[str(file)], [file], file, str(file)]
    made = [sdlora.generate("a fox", base=tiny_base, loras=loras, size=64, **SMALL)[0] for loras in given]
    assert all(torch.equal(image.latents, made[0].latents) for image in made)
    assert {image.request.size for image in made} == {(64, 64)}


def test_a_result_shows_itself_in_a_notebook(tiny_base: Path) -> None:
    (image,) = sdlora.generate("a fox", base=tiny_base, **SMALL)
    with Image.open(BytesIO(image._repr_png_())) as shown:
        assert shown.tobytes() == image.image.tobytes()
        assert shown.info["parameters"] == image.parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts []: expected a text, or a list of at least one"),
        ({"prompts": None}, "prompts None: expected a text, or a list of at least one"),
        ({"negative": None, "sampler": 3}, "negative None: expected a text\nsampler 3: expected a text"),
        (
            {"loras": None},
            "loras is a NoneType; expected 'FILE[:UNET[:TE]]', a Path or a LoraChoice, or a list of them",
        ),
        ({"count": 0}, "count 0: expected a whole number, at least 1"),
        ({"count": 1.5}, "count 1.5: expected a whole number, at least 1"),
        ({"size": "64x64"}, "size '64x64': expected pixels, 512 or (512, 768)"),
        ({"size": (64, 64, 3)}, "size (64, 64, 3): expected pixels"),
        ({"steps": 1.5}, "steps 1.5: expected a whole number, at least 1"),
        ({"loras": [3]}, "loras holds a int; expected 'FILE[:UNET[:TE]]', a Path or a LoraChoice"),
        ({"base": object()}, "base is a object; expected 'mini', the path of a checkpoint file"),
        ({"cfg": float("nan")}, "cfg nan: expected a number from 0 to 100"),
        ({"cfg": -5.0}, "cfg -5.0: expected a number from 0 to 100"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny_base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SdloraError) as caught:
        sdlora.generate(**({"prompts": "a fox", "base": tiny_base} | options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": []}, "strengths []: expected numbers, at least one"),
        ({"strengths": ["1"]}, "strengths ['1']: expected numbers"),
        ({"strengths": [float("nan")]}, "x.safetensors at strength nan: expected weights between -10 and 10"),
        ({"strengths": [1, 100]}, "x.safetensors at strength 100: expected weights between -10 and 10"),
        ({"scale": 0}, "scale 0: expected a whole number, at least 1"),
    ],
)
def test_strips_that_cannot_be_are_refused(tiny_base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SdloraError) as caught:
        sdlora.generate_strip("a fox", base=tiny_base, loras="x.safetensors", **SMALL | options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": 3}, "x: 3 is not an axis; expected 'weight:0,0.5,1', or the kind and a list of its values"),
        ({"x": ("seed", "1,2")}, "x: ('seed', '1,2') is not an axis"),
        ({"prompt": ["a", "b"]}, "prompt is a list; expected a text; for several, an axis prompt"),
        ({"scale": 1.5}, "scale 1.5: expected a whole number, at least 1"),
    ],
)
def test_grids_that_cannot_be_are_refused(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SdloraError) as caught:
        sdlora.grid(
            **{"prompt": "a fox", "x": "seed:1,2", "base": tiny_base, "out": tmp_path / "g.png"} | SMALL | options
        )
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
