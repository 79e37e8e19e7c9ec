"""Alternatives in prompts: what may be drawn, how often, what stays text, what the recipe says; what is refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import sdlora
from sdlora.cli import app
from sdlora.errors import SdloraError
from sdlora.formats.metadata_file import write_metadata
from sdlora.formats.recipe import parse_recipe
from sdlora.generation.alternatives import as_text, drawn
from tests.test_generation import random_lora

SEEDS = range(400)


def all_of(text: str) -> Counter[str]:
    return Counter(drawn(text, random.Random(seed)) for seed in SEEDS)


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("a {red|blue} fox", {"a red fox", "a blue fox"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{very |}red", {"very red", "red"}),
        ("{a {big|small} fox|an owl|}", {"a big fox", "a small fox", "an owl", ""}),
        ("{{{a|b}|c}|d}", {"a", "b", "c", "d"}),
        ("{2$$a|b|c}", {", ".join(two) for two in permutations("abc", 2)}),
        ("{2$$ and $$ a | b }", {"a and b", "b and a"}),
        ("{0-2$$a|b}", {"", "a", "b", "a, b", "b, a"}),
        ("{2$$0::a|b|{c|d}}", {"b, c", "c, b", "b, d", "d, b"}),
        ("{1$$a}", {"a"}),
        # Syntax of A1111 within and around.
        ("[{a|b}|c]", {"[a|c]", "[b|c]"}),
        ("{[a|b]|c}", {"[a|b]", "c"}),
        ("{[a:b:0.5]|[c::3]} {2::[d::3]|[d::3]}", {"[a:b:0.5] [d::3]", "[c::3] [d::3]"}),
        ("({fox:1.2|owl:.9})", {"(fox:1.2)", "(owl:.9)"}),
        ("{(a:1.2)|(b)} AND {c|d :0.5}", {f"{a} AND {b}" for a in ("(a:1.2)", "(b)") for b in ("c", "d :0.5")}),
        ("{a [b|c}", {"a [b", "c"}),
        ("{a] b|c}", {"a] b", "c"}),
        (r"{a\|b|\[c|d\]}", {r"a\|b", r"\[c", r"d\]"}),
        ("<lora:style:{0.5|1}>{ <lora:ink:1>|}", {"<lora:style:0.5> <lora:ink:1>", "<lora:style:1> <lora:ink:1>",
                                                 "<lora:style:0.5>", "<lora:style:1>"}),
        ("{a\n|b}\nc", {"a\n\nc", "b\nc"}),
    ],
)  # fmt: skip
def test_everything_that_may_be_drawn_is(text: str, possible: set[str]) -> None:
    assert set(all_of(text)) == possible


@pytest.mark.parametrize(
    "text", ["a fox, (red:1.2) [a|b] | c", r"\{a|b\}, \}", "{word}, {{word}}", "a | b {c [d|e] f}", "2$$a|b", "{}"]
)
def test_what_is_text_stays_and_draws_nothing(text: str) -> None:
    draw = random.Random(1)
    assert drawn(text, draw) == text
    assert draw.random() == random.Random(1).random()


def test_weights_are_how_often_something_is_drawn() -> None:
    assert all_of("{3::a|b}")["a"] / len(SEEDS) == pytest.approx(3 / 4, abs=0.06)
    assert all_of("{a|b|.5::c}")["c"] / len(SEEDS) == pytest.approx(1 / 5, abs=0.06)
    assert set(all_of("{0::a|b}")) == {"b"}
    # Of two that are drawn, the first is of weight 2 in 2/4, and the second where the first is another in 2/3.
    pairs = all_of("{2$$2::a|b|c}")
    assert sum(pairs[f"a, {other}"] for other in "bc") / len(SEEDS) == pytest.approx(1 / 2, abs=0.07)
    assert sum(pairs[f"{other}, a"] for other in "bc") / len(SEEDS) == pytest.approx(1 / 2 * 2 / 3, abs=0.07)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a fox, {red|blue", "prompt: a fox, {red|blue: a { without its }; close it, or write \\{ for a brace"),
        ("{{a|b}\n|c", "prompt: {{a|b} |c: a { without its }; close it, or write \\{ for a brace"),
        ("red|blue} fox :}", "prompt: red|blue} fox :}: a } without its {; write \\} for a brace"),
        ("a {3$$x|y}", "prompt: {3$$x|y}: draws 3 of 2 with a weight above 0; draw fewer, or write more"),
        ("{1-2$$0::x|y}", "prompt: {1-2$$0::x|y}: draws 1 to 2 of 1 with a weight above 0; draw fewer, or write more"),
        ("{2-1$$x|y}", "prompt: {2-1$$x|y}: draws 2 to 1 of 2 with a weight above 0; draw fewer, or write more"),
        ("{0::x|0::y}", "prompt: {0::x|0::y}: draws 1 of 0 with a weight above 0; draw fewer, or write more"),
        ("{a|" * 3000 + "}" * 3000, f"prompt: a|{'{a|' * 12}{{a: brackets in more than 50 levels"),
    ],
)
def test_faults_are_one_line(text: str, message: str) -> None:
    with pytest.raises(SdloraError) as caught:
        drawn(text, random.Random(0))
    assert list(caught.value.problems) == [message]


@pytest.mark.parametrize("text", ["{a|b}", r"\{a} }{", "[a|b] <lora:x{1}:0.5> {3$$y}", "", r"a \\{b|c}"])
def test_text_of_a_recipe_draws_nothing(text: str) -> None:
    assert drawn(as_text(text), random.Random(1)) == as_text(text) == as_text(as_text(text))
    assert "<lora:x{1}:0.5>" in as_text(text) or "<lora" not in text


def test_each_image_draws_by_its_own_seed_and_says_what(tiny_base: Path) -> None:
    options: dict[str, Any] = {"base": tiny_base, "steps": 1, "size": 64, "negative": "{blue|green}"}
    written = "a {fox|owl|snail|crab}, {2$$ink|paper|snow}"
    images = sdlora.generate(written, count=4, seed=5, **options)
    expected = [drawn(written, random.Random(seed)) for seed in range(5, 9)]
    assert [image.request.prompt for image in images] == expected
    assert len(set(expected)) > 1
    (alone,) = sdlora.generate(written, seed=7, **options)
    assert alone.parameters == images[2].parameters
    assert (alone.latents - images[2].latents).abs().max() < 1e-4
    recipe = parse_recipe(alone.parameters)
    assert (recipe.prompt, recipe.fields["Wildcard prompt"]) == (expected[2], written)
    assert recipe.negative in {"blue", "green"}
    assert recipe.fields["Wildcard negative prompt"] == "{blue|green}"
    with pytest.raises(SdloraError, match="without its }"):
        sdlora.generate("a", **options | {"negative": "{b|c"})


def test_they_go_with_wildcards_and_tags(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "animal.txt").write_text("a {red|blue} fox\nan {old|young} owl\n", encoding="utf-8")
    random_lora(tiny_base, tmp_path / "style.safetensors", seed=1)
    options: dict[str, Any] = {"base": tiny_base, "steps": 1, "size": 64, "wildcards": tmp_path, "lora_dir": tmp_path}
    images = sdlora.generate("{__animal__|__{animal|animal}__} <lora:style:{0.5|1}>", count=24, seed=0, **options)
    assert {image.request.prompt for image in images} == {"a red fox", "a blue fox", "an old owl", "an young owl"}
    assert {image.parameters.split(":")[2][:3].rstrip(">\n") for image in images} == {"0.5", "1"}


def test_an_image_repeats_whatever_braces_are_in_it(tiny_base: Path, tmp_path: Path) -> None:
    def made(*given: str) -> Any:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        result = CliRunner().invoke(app, ["generate", "--base", str(tiny_base), "--out", str(out), *given])
        assert result.exit_code == 0, result.output
        return sdlora.inspect(out).recipe, out

    recipe, out = made(r"a {fox|owl} \{x|y\} {z}", "--negative", "{blue|red} :\\}", "--steps", "1", "--seed", "3")
    again, copy = made("--from", str(out))
    with Image.open(out) as first, Image.open(copy) as second:
        assert first.tobytes() == second.tobytes()
    assert recipe.prompt.replace("{z}", r"\{z\}") == again.prompt
    assert again.negative == recipe.negative
    # As A1111 writes what it reads as text.
    text = tmp_path / "old.txt"
    text.write_text(
        "a {fox|owl} :}\nNegative prompt: {blue\nSteps: 1, Sampler: Euler, CFG scale: 5, Seed: 3, Size: 64x64, RNG: CPU",
        encoding="utf-8",
    )
    old, _ = made("--from", str(text))
    assert (old.prompt, old.negative) == (r"a \{fox|owl\} :\}", r"\{blue")


def test_strips_and_previews_draw_as_generate_does(tiny_base: Path, tmp_path: Path) -> None:
    written, negative = "a {fox|owl|snail|crab}", "{blue|green}"
    given: dict[str, Any] = {"negative": negative, "seed": 6, "steps": 1}
    (alone,) = sdlora.generate(written, base=tiny_base, **given)
    _, parameters = sdlora.generate_strip([written], base=tiny_base, loras=[], **given)
    assert parameters == alone.parameters
    assert parse_recipe(parameters).fields["Wildcard prompt"] == written
    with pytest.raises(SdloraError, match="without its }"):
        sdlora.generate_strip(["a {b|c"], base=tiny_base, loras=[])
    lora = random_lora(tiny_base, tmp_path / "style.safetensors", seed=1)
    stated = {"modelspec.trigger_phrase": "zorb", "ss_base_model_version": "sd_v1"}
    write_metadata(lora, lora, stated | {"ss_tag_frequency": json.dumps({"images": {"{smile|frown": 1}})})
    package = sdlora.export_civitai(lora, tmp_path / "up", base=str(tiny_base), prompts=[written], **given)
    recipe = sdlora.inspect(tmp_path / "up" / package.previews[0]).recipe
    assert (recipe.prompt, recipe.negative) == (alone.request.prompt, alone.request.negative)
    assert recipe.fields["Wildcard prompt"] == written
    assert f"`{alone.request.prompt} <lora:style:1>`" in (tmp_path / "up" / package.card).read_text(encoding="utf-8")
    # Tags of others in the metadata are text.
    package = sdlora.export_civitai(lora, tmp_path / "of-tags", base=str(tiny_base), steps=1)
    assert sdlora.inspect(tmp_path / "of-tags" / package.previews[0]).recipe.prompt == r"zorb, \{smile|frown"


def test_an_escaped_brace_is_a_brace(tiny_base: Path) -> None:
    """What is read is the brace alone, without its backslash."""
    options: dict[str, Any] = {"base": tiny_base, "steps": 2, "size": 64, "seed": 1}
    plain, escaped = (sdlora.generate(text, **options)[0].latents for text in ("a {fox}", r"a \{fox\}"))
    assert (plain == escaped).all()
    assert (plain != sdlora.generate("a fox", **options)[0].latents).any()
