"""Files and functions stay short enough to be read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

MODULES = sorted((ROOT / "sdlora").rglob("*.py"))
MOST_LINES_IN_A_FILE, MOST_LINES_IN_A_FUNCTION = 350, 70


@pytest.mark.parametrize("module", MODULES, ids=lambda file: str(file.relative_to(ROOT / "sdlora")))
def test_no_file_and_no_function_is_too_long(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_IN_A_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES_IN_A_FUNCTION} == {}


def test_test_files_are_short_too() -> None:
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / "tests").glob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 450} == {}
