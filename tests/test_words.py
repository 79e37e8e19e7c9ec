"""What people read is in the words of the field: the glossary of CONTRIBUTING.md, held against the tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

AVOIDED = re.compile(
    r"\b(pictures?|tells?|told|telling|mend(s|ed|ing)?|behind|stands?|dialects?|wish|anew|hangs? on|nothing to complain"
    r"|gives? no number|less(?! (than|memory|time|often|of|detail|noise)))\b",
    re.IGNORECASE,
)
"""The left column of the glossary, as far as a pattern can know it."""
ALLOWED = {"dialect"}
"""A key of the JSON of ``inspect``, which programs read."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.toml"))]
MODULES = sorted((ROOT / "sdlora").rglob("*.py"))


def texts_of(module: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string in a module, docstrings among them."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in ALLOWED:
            yield node.lineno, node.value


def docstrings_of(module: Path) -> Iterator[tuple[int, str]]:
    """Docstrings of modules, classes, functions and attributes: every string that is a statement of its own."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


@pytest.mark.parametrize("module", MODULES, ids=lambda file: str(file.relative_to(ROOT / "sdlora")))
def test_no_avoided_word_in_the_package(module: Path) -> None:
    found = [
        f"line {line}: {match[0]!r} in {text[:100]!r}"
        for line, text in texts_of(module)
        if (match := AVOIDED.search(text))
    ]
    fragments = [f"line {line}: {text[:60]!r}" for line, text in docstrings_of(module) if text.startswith("Of ")]
    assert [*found, *fragments] == []


def public(module: Path) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef, ast.ClassDef | None]]:
    """Name, definition and class of each public class, function and method of a module."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, None
        for inner in node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else ():
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                yield f"{node.name}.{inner.name}", inner, node


def documented_above() -> set[str]:
    """Names of methods that an abstract class or a protocol documents: what implements them need not say it again."""
    abstract = {
        node
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & {"ABC", "Protocol"}
    }
    # Fields of some kinds and properties of others are stated where types are checked alone.
    methods = (inner for node in abstract for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef))
    return {method.name for method in methods if ast.get_docstring(method)}


def test_everything_public_has_a_docstring() -> None:
    above = documented_above()
    assert {"delta", "advance", "encode"} <= above
    missing = [
        f"{module.relative_to(ROOT)}: {name}"
        for module in MODULES
        for name, node, owner in public(module)
        if not ast.get_docstring(node) and not (owner and node.name in above)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda file: file.name)
def test_no_avoided_word_in_what_users_open(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [f"{number}: {line}" for number, line in enumerate(lines, 1) if AVOIDED.search(line)] == []


def test_the_glossary_names_the_avoided_words() -> None:
    glossary = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Words")[2]
    rows = [line.split("|")[1].strip() for line in glossary.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 12
    assert all(AVOIDED.search(row) for row in rows if row not in ("Of …", "numbers (of a model)"))
