"""A target that cannot be written is found before anything is loaded: one line, exit code 1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdlora.cli import app
from sdlora.errors import TargetError
from sdlora.files import check_target
from tests.conftest import ROOT

VERBS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "train": (".safetensors", lambda out: ["train", "--images", "nowhere", "--trigger", "zorb", "--out", str(out)]),
    "generate": (".png", lambda out: ["generate", "a fox", "--base", "nowhere", "--out", str(out)]),
    "generate folder": ("", lambda out: ["generate", "a fox", "--base", "nowhere", "--out", str(out)]),
    "convert": (".safetensors", lambda out: ["convert", "nowhere.safetensors", str(out), "--to", "kohya"]),
    "export": ("", lambda out: ["export", "nowhere.safetensors", "--civitai", str(out)]),
    "lint sheet": (".png", lambda out: ["lint", "nowhere", "--sheet", str(out)]),
    "lint fix": ("", lambda out: ["lint", "nowhere", "--fix", "--out", str(out)]),
    "init": (".toml", lambda out: ["init", "nowhere", "--out", str(out)]),
    "quickstart": ("", lambda out: ["quickstart", "--out", str(out)]),
}
"""Verb -> the suffix of its target, and a command with every other input missing, which would be reported later."""


def refusal(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("folder", ["a file", "/proc"])
def test_a_place_without_write_access_is_named_before_anything_else(
    verb: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if folder == "/proc" and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    (tmp_path / "file").write_text("a file")
    place = tmp_path / "file" if folder == "a file" else Path(folder)
    suffix, command = VERBS[verb]
    target = place / f"new{suffix}"
    message = refusal(command(target))
    assert message.startswith(f"error: {target}: ")
    assert "choose a" in message
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_for_a_folder_and_the_reverse(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    suffix, command = VERBS[verb]
    target = tmp_path / f"there{suffix}"
    if suffix:
        target.mkdir()
    else:
        target.write_text("a file")
    if verb == "convert":  # It replaces nothing at all.
        assert "exists already" in refusal(command(target))
    else:
        assert f"{target}: is a {'folder' if suffix else 'file'}; name a" in refusal(command(target))


@pytest.mark.parametrize("verb", ["set", "redact"])
def test_metadata_is_not_written_over_a_folder(verb: str, finished: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = ["a=b"] if verb == "set" else []
    command = ["metadata", verb, str(finished[1]), *pairs, "--out"]
    assert "is a folder; name a file" in refusal([*command, str(tmp_path)])
    (tmp_path / "file").touch()
    assert "is a file; choose a name within a folder" in refusal([*command, str(tmp_path / "file" / "x.safetensors")])


@pytest.mark.skipif(not hasattr(os, "setuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_read_only_folder_is_found_by_a_user_who_is_not_root(tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    place.mkdir(0o755)
    script = f"""
import os
from pathlib import Path
from sdlora.files import check_target
from sdlora.errors import TargetError
os.chdir({str(place)!r})
os.setuid(65534)
for kind, name in (("file", "x.png"), ("folder", "."), ("new folder", "x"), ("file", "deep/down/x.png")):
    try:
        check_target(Path(name), kind)
    except TargetError as error:
        assert "Permission denied" in str(error), error
    else:
        raise SystemExit(f"{{kind}} was not refused")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    assert not list(place.iterdir())


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    check_target(tmp_path / "a" / "b" / "x.png")
    check_target(tmp_path / "a", "folder")
    check_target(tmp_path, "new folder")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TargetError, match="cannot be written"):
        check_target(tmp_path / ("x" * 300) / "y.png")
