"""Recipes of images: tags in every notation, parameters, and any text at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.formats.recipe import LoraTag, parse_recipe
from sdlora.generation.infotext import _quoted
from sdlora.generation.loras import LoraChoice

unhurried = settings(deadline=None)
names = st.text(st.characters(categories=("L", "N"), include_characters="-_. ="), min_size=1).filter(str.strip)
weights = st.floats(-10, 10).map(lambda value: float(f"{value:g}"))


def as_a1111_reads(text: str) -> tuple[str, float, float]:
    """(name, UNet weight, text encoder weight), stated after the rule of A1111's built-in Lora extension."""
    items = text.split(":")
    positional = [items[0]] + [item for item in items[1:] if "=" not in item]
    named: dict[str, Any] = dict(item.split("=") for item in items[1:] if "=" in item)
    text_encoder = float(positional[1]) if len(positional) > 1 else 1.0
    text_encoder = float(named.get("te", text_encoder))
    unet = float(positional[2]) if len(positional) > 2 else text_encoder
    return positional[0], float(named.get("unet", unet)), text_encoder


@st.composite
def tags(draw: st.DrawFn) -> str:
    positional = [f"{weight:g}" for weight in draw(st.lists(weights, max_size=2))]
    named = [f"{key}={draw(weights):g}" for key in draw(st.permutations(["te", "unet", "dyn"]))]
    named = named[: draw(st.integers(0, 3))]
    return ":".join([draw(names), *positional, *named])


@unhurried
@given(tags())
def test_weights_are_read_as_a1111_reads_them(text: str) -> None:
    tag = LoraTag.parse(text)
    assert (tag.name, tag.unet, tag.text_encoder) == as_a1111_reads(text)


@unhurried
@given(names, weights, weights)
def test_both_notations_mean_the_same(name: str, text_encoder: float, unet: float) -> None:
    forms = (f"{name}:{text_encoder:g}:{unet:g}", f"{name}:te={text_encoder:g}:unet={unet:g}")
    assert {LoraTag.parse(form) for form in forms} == {LoraTag(name=name, unet=unet, text_encoder=text_encoder)}


@unhurried
@given(tags())
def test_the_option_for_generate_has_the_same_weights(text: str) -> None:
    tag = LoraTag.parse(text)
    choice = LoraChoice.parse(tag.option)
    assert (str(choice.file), choice.unet, choice.text_encoder) == (
        str(Path(f"{tag.name}.safetensors")), tag.unet, tag.text_encoder,
    )  # fmt: skip


plain = st.text(st.characters(exclude_categories=("C", "Zl", "Zp"), exclude_characters="<>")).map(str.strip)
plain = plain.map(lambda text: " ".join(text.split())).filter(lambda text: not text.startswith("Negative prompt:"))


@unhurried
@given(
    plain,
    plain,
    st.lists(st.tuples(names, weights, weights), max_size=3),
    st.dictionaries(st.from_regex(r"[A-Z][a-z]{1,8}( [a-z]{1,8})?", fullmatch=True), plain.filter(bool), min_size=3),
)
def test_what_is_written_is_read_back(
    prompt: str, negative: str, loras: list[tuple[str, float, float]], fields: dict[str, str]
) -> None:
    """In the form of ``infotext``, with its own spelling of weights and values."""
    fields = {key: value for key, value in fields.items() if not value.startswith(('"', "{"))}
    fields |= {"Steps": "1", "Seed": "2", "Model": "a, b: c"}
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items())
    hashes = {"model": "0123456789", "lora:x": "0123456789ab"}
    choices = [(name, LoraChoice(file=Path("x"), unet=unet, text_encoder=te)) for name, unet, te in loras]
    written = "".join(f" <lora:{name}:{choice.tag}>" for name, choice in choices)
    recipe = parse_recipe(
        f"{prompt}{written}\nNegative prompt: {negative}\n{line}, Hashes: {json.dumps(hashes)}, Version: sdlora 1"
    )
    assert (recipe.prompt, recipe.negative, recipe.problems) == (prompt, negative, ())
    assert recipe.loras == tuple(LoraTag(name=name, unet=unet, text_encoder=te) for name, unet, te in loras)
    assert recipe.fields == fields | {"Hashes": json.dumps(hashes), "Version": "sdlora 1"}


@unhurried
@given(st.text())
def test_any_text_is_read(text: str) -> None:
    parse_recipe(text)
    parse_recipe(f"a <lora:{text}>\nSteps: 1, Seed: 2, {text}: 3")


@pytest.mark.parametrize(
    ("tag", "said"),
    [("x:much", "'much' is not a weight"), ("x:te=nan", "'nan' is not"), ("x:1:inf", "'inf' is"), (":1", "no LoRA")],
)
def test_faulty_tags_are_named(tag: str, said: str) -> None:
    recipe = parse_recipe(f"a <lora:{tag}> fox <lora:y:0.5>")
    assert recipe.prompt == "a fox"
    assert [lora.name for lora in recipe.loras] == ["y"]
    (problem,) = recipe.problems
    assert problem.startswith(f"<lora:{tag}>: ")
    assert said in problem


def test_a_prompt_of_several_lines_and_a_last_line_that_is_none_of_parameters() -> None:
    recipe = parse_recipe("a fox,\nred\nNegative prompt: blue,\ngreen\nsize: big, colour: red")
    assert (recipe.prompt, recipe.negative) == ("a fox,\nred", "blue,\ngreen\nsize: big, colour: red")
    assert recipe.fields == {}
