"""What a newcomer meets: the quickstart, the notebook, and the commands of the README."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from typer.main import get_command

from sdlora.cli import app
from tests.conftest import ROOT


def test_quickstart_elsewhere_says_where_to_go(sdlora) -> None:
    result = sdlora("quickstart")
    assert result.returncode == 1
    assert "run quickstart in a clone of the repository" in result.stderr


def test_the_notebook_runs_and_keeps_its_images(tmp_path: Path) -> None:
    file = ROOT / "notebooks" / "01-train-a-style.ipynb"
    kept = nbformat.read(file, as_version=4)
    outputs = [output for cell in kept.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    # A short training shows that every cell runs; the images kept in the file are from the full one.
    source = kept.copy()
    for cell in source.cells:
        cell.source = cell.source.replace("train.steps=300", "train.steps=4").replace("out/notebook", str(tmp_path))
    client = NotebookClient(source, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute()


def test_the_notebook_for_a_gpu_runs_without_one(tmp_path: Path) -> None:
    """On ``mini``, with its first cell's parameters changed as a user changes them."""
    notebook = nbformat.read(ROOT / "notebooks" / "02-your-style-on-a-gpu.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if cell.cell_type == "code")
    changed = {
        "BASE": "mini", "IMAGES": "datasets/pixel", "TRIGGER": "pixgrid", "OUT": str(tmp_path / "out"), "STEPS": 2,
        "PROMPTS": ["a fox"], "MORE": ["data.resolution=64", "samples.prompts=[]", "cache.disk=false"],
    }  # fmt: skip
    for name, value in changed.items():
        parameters.source, count = re.subn(
            rf"(?m)^{name} = .*", lambda _, n=name, v=value: f"{n} = {v!r}", parameters.source
        )
        assert count == 1, name
    # Few steps of the sampler show as much as many.
    for cell in notebook.cells:
        cell.source = cell.source.replace("seed=1)", "seed=1, steps=1)").replace(
            "prompts=prompts)", "prompts=prompts, steps=1)"
        )
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    assert (tmp_path / "out" / "pixgrid.safetensors").is_file()
    assert (tmp_path / "out" / "upload").is_dir()


README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("$ ").strip()
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("sdlora ", "$ sdlora "))
]


def test_the_readme_has_commands_and_they_name_real_options() -> None:
    assert len(COMMANDS) >= 3
    verbs = get_command(app).commands  # ty: ignore[unresolved-attribute]
    for command in COMMANDS:
        _, verb, *arguments = shlex.split(command, comments=True)
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        used = {argument for argument in arguments if argument.startswith("--")}
        assert used <= known, command


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_the_readme_links_to_files_that_are_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_readme_names_the_two_set_up_commands() -> None:
    assert "pip install -c constraints.txt . && sdlora quickstart" in README
    assert "pip install -c constraints.txt -e '.[test]' && pytest -n 2" in README
    assert "pip install --quiet -c constraints.txt -e '.[test]' && pytest -n 2" in (ROOT / ".ci" / "run").read_text()
