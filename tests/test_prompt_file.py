"""Files of prompts, as A1111's script and kohya's trainer read them, against values written by hand."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sdlora
from sdlora.cli import app
from sdlora.errors import SdloraError
from sdlora.generation.arguments import image_requests
from sdlora.generation.prompt_file import PromptLine, read_prompts
from sdlora.generation.request import ImageRequest
from sdlora.generation.samplers import SAMPLERS


def written(folder: Path, text: str) -> Path:
    file = folder / "prompts.txt"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a fox, (red:1.2) [a|b]", PromptLine(prompt="a fox, (red:1.2) [a|b]")),
        # A1111's documentation: "Prompts from file or textbox".
        (
            '--prompt "photo of sunset" --negative_prompt "orange, pink, red" --width 1024 --height 768 '
            "--sampler_name \"DPM++ 2M\" --steps 10 --batch_size 2 --n_iter 3 --cfg_scale 3 --seed 9",
            PromptLine(
                prompt="photo of sunset", negative="orange, pink, red", width=1024, height=768, sampler="dpm++2m",
                steps=10, count=6, cfg=3, seed=9,
            ),
        ),
        ("--prompt photo of a fox --steps 7", PromptLine(prompt="photo of a fox", steps=7)),
        ('--prompt "a --big fox" --steps=7', PromptLine(prompt="a --big fox", steps=7)),
        ("a fox --steps=7", PromptLine(prompt="a fox", steps=7)),
        ("--prompt \"a fox's den\" --seed -1", PromptLine(prompt="a fox's den", seed=-1)),
        ('--prompt "a fox" --negative_prompt ""', PromptLine(prompt="a fox", negative="")),
        # kohya's documentation of --sample_prompts.
        (
            "masterpiece, 1girl, in white shirts --n low quality, bad anatomy --w 768 --h 512 --d 1 --l 7.5 --s 28",
            PromptLine(
                prompt="masterpiece, 1girl, in white shirts", negative="low quality, bad anatomy", width=768, height=512,
                seed=1, cfg=7.5, steps=28,
            ),
        ),
        ("a fox's tail --ss euler_a --N blue", PromptLine(prompt="a fox's tail", sampler="euler-a", negative="blue")),
        ("a fox --ss DPM++ 2M Karras", PromptLine(prompt="a fox", sampler="dpm++2m", schedule="karras")),
        ("a fox -- in snow, semi--dark --s 3", PromptLine(prompt="a fox -- in snow, semi--dark", steps=3)),
    ],
)  # fmt: skip
def test_lines_are_read_as_documented(line: str, expected: PromptLine, tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, f"\ufeff# a comment\n\n  {line}  \n")) == [expected]


def test_all_problems_of_a_file_are_reported_with_their_lines(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        'a fox --s ten --w 0 --l -1\nfine\n--steps 4\n--prompt "open\na fox --cn pose.png --ss magic\n'
        "a fox --d 1 --seed 2\n--styles x --prompt y\na fox --s\n",
    )
    with pytest.raises(SdloraError) as caught:
        read_prompts(file)
    assert [problem.replace(f"{file}: ", "").split("; there are")[0] for problem in caught.value.problems] == [
        "line 1: --s ten: expected a whole number from 1 to 1000",
        "line 1: --w 0: expected a whole number from 1 to 65536",
        "line 1: --l -1: expected a number from 0 to 100",
        "line 3: has no prompt; write it first, or after --prompt",
        "line 4: has a quote without its end; close it, or write \\' for an apostrophe",
        "line 5: --cn: is not an option of a prompt here",
        "line 5: --ss magic: is not a sampler; choose one of " + ", ".join(SAMPLERS),
        "line 6: --seed: seed is stated twice",
        "line 7: --styles: is not an option of a prompt here",
        "line 8: --s : expected a whole number from 1 to 1000",
    ]
    for text, message in (("# nothing\n", "has no prompts"), ("x\udc80", "cannot be read as UTF-8")):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(SdloraError, match=message):
            read_prompts(file)
    with pytest.raises(SdloraError, match="no such file of prompts"):
        read_prompts(tmp_path / "none.txt")


def test_a_line_overrides_what_is_common(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "a fox\n--prompt owl --n_iter 3 --seed 40 --outpath_samples x\nsea --w 64 --n blue --l 2\n"
    with caplog.at_level(logging.WARNING, "sdlora"):
        lines = read_prompts(written(tmp_path, text))
    assert ["line 2: --outpath_samples is not followed" in record.getMessage() for record in caplog.records] == [True]
    common = ImageRequest(prompt="", negative="grey", seed=7, steps=4, cfg=3, size=(128, 192), sampler="ddim")
    arguments = {"seed": 7, "count": 2, "size": (128, 192), "negative": "grey", "steps": 4, "cfg": 3, "sampler": "ddim"}
    sea = replace(common, prompt="sea", size=(64, 192), negative="blue", cfg=2)
    assert image_requests(lines, **arguments) == [  # ty: ignore[invalid-argument-type]
        *(replace(common, prompt="a fox", seed=seed) for seed in (7, 8)),
        *(replace(common, prompt="owl", seed=seed) for seed in (40, 41, 42)),
        *(replace(sea, seed=seed) for seed in (7, 8)),
    ]
    with pytest.raises(SdloraError, match="prompt 'sea': has width 64 alone; state both sides"):
        image_requests(lines, **(arguments | {"size": None}))  # ty: ignore[invalid-argument-type]


def test_the_command_draws_the_prompts_of_a_file(tiny_base: Path, tmp_path: Path) -> None:
    file = written(tmp_path, "a [fox:owl:1]\n--prompt sea --steps 2 --batch_size 2 --seed 5\n")
    out = tmp_path / "out"
    given = ["generate", "a tower", "--prompts", str(file), "--base", str(tiny_base), "--steps", "1", "--seed", "3"]
    result = CliRunner().invoke(app, [*given, "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    names = ["00001-3-a-tower.png", "00002-3-a-fox-owl-1.png", "00003-5-sea.png", "00004-6-sea.png"]
    assert sorted(file.name for file in out.iterdir()) == names
    recipe = sdlora.inspect(out / "00004-6-sea.png").recipe
    assert recipe is not None
    assert (recipe.fields["Steps"], recipe.fields["Seed"]) == ("2", "6")
    (alone,) = sdlora.generate("sea", base=tiny_base, steps=2, seed=6)
    assert alone.parameters in [sdlora.inspect(out / names[3]).metadata["parameters"]]
    for arguments, message in ((["generate"], "there is no prompt"), ([*given, "--strip"], "remove")):
        wrong = CliRunner().invoke(app, arguments)
        assert (wrong.exit_code, message in wrong.stderr) == (2, True)
