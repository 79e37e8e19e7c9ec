"""What importing costs, and which way imports point."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sdlora

PACKAGE = Path(sdlora.__file__).parent

RANKS = [
    *(
        "_version",
        "errors",
        "aligned",
        "progress",
        "files",
        "randomness",
        "families",
        "lora",
        "config",
        "formats",
        "base",
        "data",
        "cache",
    ),
    *("lint", "captioning", "library", "generation", "grids", "pipelines", "tools", "training", "sweeps", "publish"),
    *("cli", "__main__"),
]
"""Every wing of the package, from the ground up: a wing imports from those before it and from itself, nothing else."""


def wing_of(module: str) -> str:
    return module.partition(".")[0]


def relative_imports(file: Path, module: str) -> list[str]:
    """Modules of this package that ``file`` imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = module.split(".")[: -node.level] if node.level <= module.count(".") + 1 else []
            target = ".".join([*parents, *([node.module] if node.module else [])])
            found += [target] if node.module else [".".join([*parents, name.name]) for name in node.names]
    return [target for target in found if target and target != "__version__"]


MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.name != "__init__.py"
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    own = RANKS.index(wing_of(module))
    for target in relative_imports(MODULES[module], module):
        assert wing_of(target) == wing_of(module) or RANKS.index(wing_of(target)) < own, f"{module} imports {target}"


def test_no_import_runs_in_a_circle() -> None:
    """Within a wing too: modules whose imports are all resolved are taken away until nothing is left."""
    waiting = {module: set(relative_imports(file, module)) & MODULES.keys() for module, file in MODULES.items()}
    while ready := {module for module, targets in waiting.items() if not targets}:
        waiting = {module: targets - ready for module, targets in waiting.items() if module not in ready}
    assert waiting == {}


def test_importing_the_package_loads_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import sdlora; print(*(set(sys.modules) - before), sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "sdlora" in loaded
    assert sorted(loaded - sys.stdlib_module_names - {"sdlora"}) == []


def test_public_names_are_sorted_and_resolve() -> None:
    assert sorted(sdlora.__all__, key=lambda name: (name[0].islower(), name)) == list(sdlora.__all__)
    for name in sdlora.__all__:
        assert getattr(sdlora, name) is not None
    assert callable(sdlora.train)
    assert callable(sdlora.generate)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sdlora.nothing


def test_help_answers_at_once() -> None:
    """0.3 s on a machine that imports typer in 0.1 s: the same machine may be twice as slow at another hour."""

    def seconds(*arguments: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
        return time.perf_counter() - began

    # The best of several: a busy machine slows a start-up, nothing makes it too fast.
    turns = [(seconds("-m", "sdlora.cli", "--help"), seconds("-c", "import typer")) for _ in range(7)]
    assert min(ours for ours, _ in turns) < 3 * min(typer for _, typer in turns)


def test_help_imports_neither_rich_nor_torch() -> None:
    code = """
import sys
from sdlora.cli.app import app
import sdlora.cli
try:
    app(["--help"])
except SystemExit:
    print(sorted({"torch", "diffusers", "numpy", "rich"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"
