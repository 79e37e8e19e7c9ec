"""A real signal saves and stops, and several processes stop after the same step."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sdlora.training.interruption import InterruptFlag
from tests.conftest import ROOT
from tests.training_runs import overrides

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent to processes")
ENDLESS = ("train.steps=100000", "train.save_every=5", "cache.disk=false")
PAIR = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
"""Environment of processes that train together without a GPU."""


def start(*arguments: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "sdlora.cli", "train", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_a_checkpoint(folder: Path, *processes: subprocess.Popen[str], after: int = 0) -> None:
    deadline = time.monotonic() + 150
    while not any(int(file.stem[5:]) > after for file in folder.glob("step-*.safetensors")):
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_within_the_handler_of_another_does_not_wait_for_it() -> None:
    """At every line that the first one runs, in any module, the second one comes."""
    flag, lines = InterruptFlag(None), list[str]()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            lines.append(frame.f_code.co_name)
            sys.settrace(None)
            flag.set(signal.SIGTERM)
            sys.settrace(trace)
        return trace

    def first() -> None:
        sys.settrace(trace)
        flag.set()

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), f"it waits in {lines[-1]}"
    assert "set" in lines
    assert flag.is_set()
    assert flag.terminated


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


@pytest.mark.parametrize(
    ("ranks", "number", "code"),
    [((1,), signal.SIGTERM, 143), ((0, 1), signal.SIGINT, 130)],
    ids=["sigterm-of-one", "ctrl-c-of-both"],
)
def test_two_processes_stop_after_the_same_step(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, ranks: tuple[int, ...], number: int, code: int
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **PAIR}
    settings = overrides(tiny_base, finished[0], tmp_path / "x.safetensors", *ENDLESS)
    pair = [start(*settings, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
    try:
        wait_for_a_checkpoint(tmp_path / "x.resume", *pair)
        for rank in ranks:  # The others know of it by the compared flag alone.
            pair[rank].send_signal(number)
        errors = [process.communicate(timeout=60)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [code, code], errors
    stopped = {text.split("stopped after step ")[1].split()[0] for text in errors}
    assert len(stopped) == 1
    assert (tmp_path / "x.resume" / f"step-{int(stopped.pop()):08}.safetensors").exists()
    assert not (tmp_path / "x.lock").exists()


def test_a_stopped_launcher_stops_its_processes_and_the_same_run_resumes(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    settings = overrides(tiny_base, finished[0], tmp_path / "x.safetensors", *ENDLESS)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    stopped = 0
    for launcher, environment in ((launch, PAIR), ((), {})):
        process = start(*settings, launcher=launcher, **environment)
        try:
            wait_for_a_checkpoint(tmp_path / "x.resume", process, after=stopped)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert f"Training: {stopped} of 100000" in errors
        stopped = int(errors.split("stopped after step ")[1].split()[0])
        assert (tmp_path / "x.resume" / f"step-{stopped:08}.safetensors").exists()
