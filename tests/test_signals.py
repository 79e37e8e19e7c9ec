"""A real SIGTERM saves and stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.training_runs import overrides

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent to processes")
ENDLESS = ("train.steps=100000", "train.save_every=5", "cache.disk=false")


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sdlora.cli", "train", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def wait_for_a_checkpoint(folder: Path, *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not list(folder.glob("step-*.safetensors")):
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_saves_and_stops(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    process = start(*overrides(tiny_base, finished[0], tmp_path / "x.safetensors", *ENDLESS))
    try:
        wait_for_a_checkpoint(tmp_path / "x.resume", process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    stopped = int(errors.split("stopped after step ")[1].split()[0])
    assert (tmp_path / "x.resume" / f"step-{stopped:08}.safetensors").exists()
    assert not (tmp_path / "x.lock").exists()
