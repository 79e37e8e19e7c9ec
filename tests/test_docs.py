"""The README and the pages in docs: every command in them runs, every snippet of Python too, every link leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdlora.base.checkpoint import find_base
from sdlora.cli import app
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {
    "train": ["train.steps=2", "data.resolution=64", "samples.steps=1", "samples.size=64"],
    "sweep": ["train.steps=2", "data.resolution=64"],
    "generate": ["--steps", "1", "--size", "64x64"],
    "grid": ["--steps", "1", "--size", "64x64"],
    "export": ["--steps", "1"],
}
"""Verb -> arguments that make it quick; the test shows that the command as written is understood and does its work."""


def commands_of(page: Path) -> list[str]:
    """Commands of ``page`` in order, without the two that set everything up: those have a test of their own."""
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("sdlora ")]


def snippets_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def clone(
    tmp_path_factory: pytest.TempPathFactory, tiny_files: dict[str, Path], models: dict[str, Path]
) -> Iterator[Path]:
    """A folder with what a clone has, the files that the pages call "my ...", and the LoRAs that earlier commands leave."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("datasets", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(tiny_files["sdxl"], folder / "my-checkpoint.safetensors")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    mask.save(folder / "my-mask.png")
    width = find_base("mini").parts["text_encoder"].shapes()["text_model.embeddings.token_embedding.weight"][1]
    save_file({"emb_params": torch.ones(2, width) / 100}, folder / "my-style.safetensors")
    shutil.copytree(models["blip"], folder / "my-captioner")
    shutil.copytree(ROOT / "datasets" / "pixel", folder / "my-images", ignore=lambda _, names: sorted(names)[6:])
    before = Path.cwd()
    os.chdir(folder)
    run("sdlora train configs/quickstart-blueprint.toml output.path=out/blueprint.safetensors train.seed=1")
    run("sdlora train configs/quickstart-pixel.toml output.path=out/pixel.safetensors")
    yield folder
    os.chdir(before)


def run(command: str) -> None:
    _, *arguments = shlex.split(command)
    given = {word for word in arguments if word.startswith("--")}
    short = SHORT.get(arguments[0], [])
    if not given & set(short) and not (arguments[0] == "train" and "--restart" in given):
        arguments += short
    code = app(arguments, standalone_mode=False)
    assert not code, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_runs_as_written(page: Path, clone: Path) -> None:
    commands = commands_of(page)
    assert commands or page.stem in ("settings", "gpu", "optimizers", "python", "what-works")
    for command in commands:
        run(command)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets_of(page)], ids=lambda page: page.stem)
def test_every_snippet_of_python_runs(page: Path, clone: Path) -> None:
    names: dict[str, object] = {}
    for snippet in snippets_of(page):
        shortened = snippet.replace('.safetensors"]', '.safetensors", "train.steps=2", "data.resolution=64"]')
        exec(compile(shortened.replace("seed=1)", "seed=1, steps=1)"), page.name, "exec"), names)


LINKS = [
    (page, target)
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]
    for target in sorted(set(re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))))
]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_every_link_leads_to_a_file(page: Path, target: str) -> None:
    assert (page.parent / target).exists()


def test_the_readme_is_a_front_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
