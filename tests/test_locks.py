"""Two runs never write one output; a lock that a killed process left is no obstacle."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import sdlora as package
from sdlora.errors import Interrupted, ResumeError
from sdlora.training.lock import _refuse_or_remove, locked
from tests.conftest import ROOT
from tests.training_runs import config_for

HOLD = """
import sys, time
from pathlib import Path
from sdlora.training.lock import locked
try:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


def holder(output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_says_who_holds_the_output(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output, lock = tmp_path / "new" / "x.safetensors", tmp_path / "new" / "x.lock"
    first = holder(output)
    try:
        with pytest.raises(ResumeError, match=rf"x\.safetensors: process {first.pid} on this machine is writing it"):
            package.train(config_for(tiny_base, finished[0], output))
        assert [file.name for file in lock.parent.iterdir()] == ["x.lock"]
        first.send_signal(signal.SIGINT)
        assert first.wait(30) == 130
        assert not lock.exists()
    finally:
        first.kill()
        first.communicate()


def test_the_lock_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    output, lock = tmp_path / "x.safetensors", tmp_path / "x.lock"
    first = holder(output)
    first.kill()
    first.communicate()
    assert lock.exists()
    with locked(output):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with pytest.raises(ResumeError, match="on this machine is writing it"), locked(output):
            pass
        assert lock.exists()
    assert not lock.exists()


def test_a_lock_that_another_run_writes_meanwhile_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs see what a killed one left; the other one replaces it just before this one would remove it."""
    lock = tmp_path / "x.lock"
    left, new = (json.dumps({"pid": os.getppid(), "host": socket.gethostname(), "started": n}) for n in (1.0, 2.0))
    lock.write_text(left)
    change = {"rename": Path.rename, "unlink": Path.unlink}

    def replaced_first(name: str) -> None:
        def changed(self: Path, *arguments: object) -> object:
            monkeypatch.undo()
            lock.write_text(new)
            return change[name](self, *arguments)

        monkeypatch.setattr(Path, name, changed)

    for name in change:
        replaced_first(name)
    _refuse_or_remove(lock, tmp_path / "x.safetensors", "output.path")
    assert lock.read_text() == new
    assert [file.name for file in tmp_path.iterdir()] == ["x.lock"]


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    lock.write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname(), "started": 1.0}))
    with locked(tmp_path / "x.safetensors"):
        pass
    assert not lock.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"pid": 7, "host": "elsewhere", "started": 1.0}), "process 7 on elsewhere is writing it"),
        ("torn", "remove that file if none does"),
        ("[]", "remove that file if none does"),
    ],
)
def test_what_cannot_be_known_is_left_to_the_user(text: str, message: str, tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    lock.write_text(text)
    with pytest.raises(ResumeError, match=re.escape(message)), locked(tmp_path / "x.safetensors"):
        pass
    assert lock.read_text() == text


def test_no_lock_is_left_by_a_run_that_ends_or_is_stopped(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stopped(*_: object, **__: object) -> None:
        seen.extend(file.name for file in tmp_path.iterdir())
        raise Interrupted("stopped")

    monkeypatch.setattr("sdlora.training.loop.run_training", stopped)
    with pytest.raises(Interrupted):
        package.train(config_for(tiny_base, finished[0], tmp_path / "x.safetensors"))
    assert seen == ["x.lock"]
    assert not list(tmp_path.iterdir())
    assert not finished[1].with_suffix(".lock").exists()
