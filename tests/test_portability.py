"""What exists on POSIX alone has another way: modules, calls, links, the console's encoding."""

from __future__ import annotations

import ast
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

from sdlora import files
from sdlora.captioning.folder import write_captions
from sdlora.cli.generate import _slug
from sdlora.errors import TargetError
from sdlora.formats.metadata import safe_title
from sdlora.progress import Silence
from tests.conftest import ROOT, write_images

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


def test_captions_are_written_where_links_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 3)
    for number in (0, 1):
        (tmp_path / "images" / f"{number}.txt").unlink()
    monkeypatch.setattr(os, "link", raising(errno.EPERM))

    class Model:
        at_once = 1

        def caption(self, image: Image.Image) -> str:
            (tmp_path / "images" / "1.txt").write_text("came meanwhile")
            return "a thing"

        def captions(self, images: Sequence[Image.Image]) -> list[str]:
            return [self.caption(image) for image in images]

    report = write_captions(tmp_path / "images", Model, trigger="zorb", extension=".txt", progress=Silence())
    assert [Path(file).name for file in report.written] == ["0.txt"]
    captions = {file.name: file.read_text() for file in (tmp_path / "images").glob("*.txt")}
    assert captions == {"0.txt": "zorb, a thing\n", "1.txt": "came meanwhile", "2.txt": "a thing of kind 2"}
    assert not list((tmp_path / "images").glob("*.partial"))


def raising(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_system_that_opens_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows does."""
    monkeypatch.setattr(os, "open", raising(errno.EACCES))
    for content in (b"1", b"2"):
        files.write_whole(tmp_path / "a" / "b", content)
        assert (tmp_path / "a" / "b").read_bytes() == content
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_syncs_no_folders(
    number: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails is another matter."""
    real = os.fsync

    def fsync(handle: int) -> None:
        raising(number)() if stat.S_ISDIR(os.fstat(handle).st_mode) else real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="error") if fails else nullcontext():
        files.write_whole(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


class ShortPaths:
    """Windows that does not allow long paths: it says of them that there is no such file, and of folders too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(files, "_is_windows", lambda: True)
        for name in ("open", "mkdir"):
            monkeypatch.setattr(Path, name, self.limited(getattr(Path, name)))

    @staticmethod
    def limited(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **options: Any) -> Any:
            if len(os.path.abspath(path)) > files.WINDOWS_PATH:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            return real(path, *args, **options)

        return call


@pytest.mark.parametrize("kind", ["file", "new folder"])
def test_a_path_that_is_too_long_for_windows_is_named(
    kind: Literal["file", "new folder"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * (files.WINDOWS_PATH - len(str(tmp_path)) - 10))
    deep.mkdir()
    ShortPaths(monkeypatch)
    said = f"has [0-9]+ characters and this Windows takes {files.WINDOWS_PATH}.*LongPathsEnabled = 1"
    for target in (deep / "style.safetensors", tmp_path / "new" / ("x" * 240)):
        with pytest.raises(TargetError, match=said):
            files.check_target(target, kind)
    for write in (files.write_whole, files.write_new):
        with pytest.raises(OSError, match=said):
            write(deep / "style.safetensors", b"1")
    with pytest.raises(OSError, match=said), files.whole_folder(deep / "upload"):
        pass
    assert os.listdir(deep) == []
    files.check_target(tmp_path / "style.safetensors", kind)
    files.write_whole(tmp_path / "style.safetensors", b"1")


def test_long_paths_are_used_where_windows_allows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_is_windows", lambda: True)
    target = tmp_path / ("d" * 200) / ("x" * 240)
    files.check_target(target)
    files.write_whole(target, b"1")
    assert target.read_bytes() == b"1"


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
