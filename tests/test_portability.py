"""What exists on POSIX alone has another way: modules, calls, links, the console's encoding."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdlora import files
from sdlora.cli.generate import _slug
from sdlora.formats.metadata import safe_title
from tests.conftest import ROOT

POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_CALLS = {
    *("os.fork", "os.getuid", "os.geteuid", "os.killpg", "os.mkfifo", "os.statvfs", "os.uname", "os.umask"),
    *("os.chown", "signal.SIGKILL", "signal.SIGHUP", "signal.alarm", "signal.pause"),
}
MODULES = sorted((ROOT / "sdlora").rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda file: str(file.relative_to(ROOT / "sdlora")))
def test_nothing_is_imported_or_called_that_exists_on_posix_alone(module: Path) -> None:
    """An import within ``try`` has another way; each such call is to be tested here without it."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    tried = {id(node) for each in ast.walk(tree) if isinstance(each, ast.Try) for node in ast.walk(each)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in tried:
            continue
        if isinstance(node, ast.Import):
            found |= POSIX_MODULES & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= POSIX_MODULES & {node.module}
        elif isinstance(node, ast.Attribute):
            found |= POSIX_CALLS & {ast.unparse(node)}
    assert not found


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert files.write_new(tmp_path / "a", b"1")
    assert not files.write_new(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["a"]


def test_a_console_that_lacks_letters(tmp_path: Path) -> None:
    (tmp_path / "日本").mkdir()
    command = [sys.executable, "-m", "sdlora.cli", "cache", "info", "--folder", "日本"]
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, env=env, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.startswith(rb"\u65e5\u672c: 0 entries")


@pytest.mark.parametrize("name", ["a:b", "style v2.", "..", "x ", 'q"uo*te?', "é/ü", "a<b>|c", ""])
def test_names_that_are_made_hold_on_every_system(name: str) -> None:
    """Windows has no names with these characters, and drops dots and spaces at the end."""
    for made in (safe_title(name), _slug(name)):
        assert made
        assert not set(made) & set('<>:"/\\|?* ')
        assert not made.endswith(".")
