"""Wildcards: what is chosen, by Python's own generator and by hand; what the recipe says; what is refused."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sdlora
from sdlora.cli import app
from sdlora.errors import SdloraError
from sdlora.formats.recipe import parse_recipe
from sdlora.generation.wildcards import Wildcards
from tests.test_generation import random_lora

ANIMALS = ["a fox", "an owl", "a snail", "a crab", "a heron"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "wild"
    (folder / "colours").mkdir(parents=True)
    (folder / "animal.txt").write_text("\ufeff# animals\n" + "\n\n".join(ANIMALS) + "\r\n", encoding="utf-8")
    (folder / "colours" / "warm.txt").write_text("red\norange\n(yellow:1.2)\n", encoding="utf-8")
    (folder / "scene.txt").write_text("__animal__ and __animal__, __colours/warm__\n", encoding="utf-8")
    (folder / "one.txt").write_text("__two__\n", encoding="utf-8")
    (folder / "two.txt").write_text("__one__\n", encoding="utf-8")
    (folder / "empty.txt").write_text("\n# nothing\n", encoding="utf-8")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    return folder


@pytest.mark.parametrize("seed", [0, 1, 2, 2**32 - 1])
def test_the_seed_chooses_as_in_a1111s_extension(folder: Path, seed: int) -> None:
    warm = ["red", "orange", "(yellow:1.2)"]
    draw = random.Random(seed)
    expected = f"x, ({draw.choice(ANIMALS)}:1.1), {draw.choice(warm)}, {draw.choice(ANIMALS)} snake__case__ __ y"
    wildcards = Wildcards(folder)
    text = "x, (__animal__:1.1), __colours/warm__, __animal__ snake__case__ __ y"
    assert wildcards.chosen(text, seed) == wildcards.chosen(text, seed) == expected


def test_entries_may_name_wildcards(folder: Path) -> None:
    found = {Wildcards(folder).chosen("__scene__!", seed) for seed in range(300)}
    assert len(found) == len(ANIMALS) ** 2 * 3
    assert all(" and " in text and "__" not in text and text.endswith("!") for text in found)


def test_each_image_chooses_by_its_own_seed_and_says_what(tiny_base: Path, folder: Path) -> None:
    options = {"base": tiny_base, "steps": 1, "size": 64, "wildcards": folder, "negative": "bad, __colours/warm__"}
    images = sdlora.generate(["__animal__, BREAK", "plain"], count=4, seed=5, **options)  # ty: ignore[invalid-argument-type]
    chosen = [random.Random(seed).choice(ANIMALS) for seed in range(5, 9)]
    assert len(set(chosen)) > 1
    assert [image.request.prompt for image in images] == [f"{one}, BREAK" for one in chosen] + ["plain"] * 4
    (alone,) = sdlora.generate("__animal__, BREAK", seed=7, **options)  # ty: ignore[invalid-argument-type]
    assert alone.parameters == images[2].parameters
    assert (alone.latents - images[2].latents).abs().max() < 1e-4
    recipe = parse_recipe(images[2].parameters)
    assert recipe.prompt == f"{chosen[2]}, BREAK"
    assert recipe.fields["Wildcard prompt"] == "__animal__, BREAK"
    assert recipe.fields["Wildcard negative prompt"] == "bad, __colours/warm__"
    assert recipe.negative in {"bad, red", "bad, orange", "bad, (yellow:1.2)"}
    assert "Wildcard prompt" not in images[4].parameters


def test_tags_in_entries_load_loras(tiny_base: Path, folder: Path) -> None:
    random_lora(tiny_base, folder / "style.safetensors", seed=1)
    (folder / "look.txt").write_text("ink <lora:style:0.5>", encoding="utf-8")
    options = {"base": tiny_base, "steps": 1, "size": 64, "seed": 1, "wildcards": folder, "lora_dir": folder}
    (image,) = sdlora.generate("a fox, __look__", **options)  # ty: ignore[invalid-argument-type]
    assert image.parameters.startswith("a fox, ink <lora:style:0.5>\n")
    assert 'Wildcard prompt: "a fox, __look__"' in image.parameters


def test_all_problems_are_one_line_each(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = ["__animl__ __one__", "__empty__ __latin__ __../secret__", "__animl__"]
    (folder.parent / "secret.txt").write_text("x", encoding="utf-8")
    with pytest.raises(SdloraError) as caught:
        sdlora.generate(prompts, wildcards=folder)
    assert [line.replace(str(folder), "DIR") for line in caught.value.problems] == [
        "prompt: __animl__: there is no file animl.txt in DIR; did you mean __animal__?",
        "prompt: __one__ in __two__ in __one__: a wildcard may not contain itself",
        "DIR/empty.txt: has no entries; write one a line",
        "DIR/latin.txt: cannot be read as UTF-8 text ('utf-8' codec can't decode byte 0xe9 in position 3: unexpected end of "
        "data)",
        "prompt: __../secret__: there is no file ../secret.txt in DIR",
    ]
    with pytest.raises(SdloraError, match="no such folder of wildcards"):
        sdlora.generate("an animal", wildcards=folder / "nowhere")


def test_the_command_takes_a_folder(tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    given = ["generate", "__animal__", "--base", str(tiny_base), "--steps", "1", "--seed", "3", "--out", str(out)]
    given += ["--wildcards", str(folder)]
    assert CliRunner().invoke(app, given).exit_code == 0
    recipe = sdlora.inspect(out).recipe
    assert recipe is not None
    assert recipe.prompt == random.Random(3).choice(ANIMALS)
    result = CliRunner().invoke(app, [*given, "--strip"])
    assert (result.exit_code, "prompts as written" in result.stderr) == (2, True)


def test_without_a_folder_they_are_text(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sdlora"):
        (image,) = sdlora.generate("__animal__", base=tiny_base, steps=1, seed=1)
    assert image.parameters.startswith("__animal__\n")
    assert ["--wildcards DIR" in record.getMessage() for record in caplog.records] == [True]
