"""What other programs read in a prompt: refused or reported, never silently taken as words. And names in recipes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import sdlora
from sdlora.errors import SdloraError
from sdlora.generation.prompt_syntax import check_syntax
from tests.conftest import ROOT

FOREIGN = ROOT / "tests" / "foreign" / "kohya-sd1.safetensors"


@pytest.mark.parametrize(
    ("tag", "instead"),
    [
        ("<lora:style:1>", "--lora style.safetensors:1 "),
        ("<lora:my style:0.8:0.5>", "--lora my style.safetensors:0.5:0.8 "),
        ("<lora:x:te=0.5:unet=1>", "--lora x.safetensors:1:0.5 "),
        ("<lora:x:strong>", "'strong' is not a weight"),
        ("<lyco:x:1>", "--lora x.safetensors:1 "),
        ("<hypernet:x:1>", "hypernetworks are not supported"),
    ],
)
def test_tags_are_refused_with_the_option_to_use(tag: str, instead: str) -> None:
    for options in ({"prompts": f"a fox {tag}"}, {"prompts": "a fox", "negative": tag}):
        with pytest.raises(SdloraError, match=re.escape(tag)) as caught:
            sdlora.generate(**options)  # ty: ignore[invalid-argument-type]
        assert instead in str(caught.value)
    with pytest.raises(SdloraError):
        sdlora.generate_strip([tag], loras=[])


def test_tags_in_prompts_of_previews_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SdloraError, match="a tag loads nothing here"):
        sdlora.export_civitai(FOREIGN, tmp_path / "up", prompts=["a fox <lora:x:1>"])
    assert not (tmp_path / "up").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "a __colour/warm__ fox",
            "__colour/warm__: wildcards need sdlora generate --wildcards DIR (in Python wildcards=)",
        ),
        ("a fox <LORA:x:1>", "<LORA:x:1>: is no tag that is known, such as <lora:name:1>"),
    ],
)
def test_other_syntax_is_reported(text: str, named: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sdlora"):
        check_syntax([text, text])
    assert [record.getMessage() for record in caplog.records] == [f"prompt: {named}; it is read as text"]


@pytest.mark.parametrize("text", ["a [b:c:d:3] fox", "a [b:c|d:3]", "[x (a:3] y", "[a|b:0.5]"])
def test_malformed_editing_is_reported(text: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sdlora"):
        check_syntax([text])
    (record,) = caplog.records
    written = text[text.index("[") : text.index("]") + 1]
    assert record.getMessage() == (
        f"prompt: {written}: is neither [from:to:when], [to:when], [from::when] nor [a|b]; it is read as text"
    )


def test_and_is_text_in_a_negative_prompt_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sdlora"):
        check_syntax(["a fox AND a dog"], ["blue AND red", "[blue:red:3]"])
    assert [record.getMessage() for record in caplog.records] == [
        "prompt: AND in a negative prompt is not supported; it is read as text"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a (fox:1.2), [dog], __init, and", r"\[a:b:0.5\]", "(a|b)", "BREAK {x} <3 <lora>", "a fox AND a dog :1.2",
        "a [fox:dog:0.5] [[a|b]:3] [c::5]",
        # What is left of braces once alternatives were drawn.
        r"a \{red|blue\} fox", "a {[fox|dog]}",
    ],
)  # fmt: skip
def test_ordinary_prompts_are_silent(text: str, caplog: pytest.LogCaptureFixture) -> None:
    check_syntax([text])
    assert caplog.records == []


def test_recipes_call_bases_and_loras_by_names_that_can_be_read(tiny_base: Path, tmp_path: Path) -> None:
    from sdlora.generation.loras import LoraChoice
    from tests.test_generation import random_lora
    from tests.tiny import copy_base

    base = copy_base(tiny_base, tmp_path / 'base, "new": 2')
    file = random_lora(tiny_base, tmp_path / "a: style.safetensors", seed=1)
    named = tmp_path / "b:c.safetensors"
    sdlora_metadata(file, named, {"ss_output_name": "my-style"})
    loras = [LoraChoice(file=file, unet=0.5, text_encoder=0.5), LoraChoice(file=named, unet=0.9, text_encoder=0.25)]
    (image,) = sdlora.generate("a fox", base=str(base), loras=loras, steps=1, seed=1)
    assert image.parameters.startswith("a fox <lora:a-style:0.5> <lora:my-style:te=0.25:unet=0.9>\n")
    assert ", Model: base new 2, " in image.parameters


def sdlora_metadata(source: Path, target: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(source), target, metadata=metadata)
