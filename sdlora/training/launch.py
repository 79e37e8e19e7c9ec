"""Starts the processes of ``sdlora train --processes N`` on this machine, and ends them together.

Unlike torchrun, it waits for a state to be saved however long that takes, and says in one line which process failed and why.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from ..errors import ConfigError, ProcessLostError, printed_problems

LAUNCHED = "SDLORA_LAUNCHED"
"""Variable of a process that is to end with the one that started it."""
PATIENCE = 30.0
"""Seconds that the other processes have for ending after one has failed."""
POLL_EVERY = 0.05
SHOWN_LINES = 20
"""Lines of the output of a process that are shown where it ended with no error of ours."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the processes of a run have ended."""

    code: int
    """Exit code of the whole."""
    problems: tuple[str, ...] = ()
    """What the first process has not said itself, one line each."""


@dataclass(kw_only=True, eq=False)
class _Process:
    rank: int
    popen: subprocess.Popen[bytes]
    errors: IO[bytes] | None
    """Standard error; None for the first process, which has that of this one."""
    closed: bool = field(default=False)
    """Whether it was asked to end."""

    @property
    def runs(self) -> bool:
        return self.popen.poll() is None

    @property
    def failed_itself(self) -> bool:
        """Whether it ended with an error, neither because it was asked to end nor because another one ended."""
        code, asked = self.popen.returncode, (-signal.SIGTERM, 128 + signal.SIGTERM)
        return code not in (None, 0, ProcessLostError.exit_code) and not (self.closed and (code < 0 or code in asked))

    def close(self) -> None:
        """Ask it to save its state and end."""
        if self.runs:
            self.closed = True
            if os.name == "nt" and self.popen.stdin is not None:  # There, ``terminate`` leaves no time for saving.
                self.popen.stdin.close()
            else:
                self.popen.terminate()

    def kill(self) -> None:
        if self.runs:
            self.closed = True
            self.popen.kill()

    def release(self) -> None:
        """Close its files, after it has ended or was killed."""
        self.kill()
        self.popen.wait()
        for file in (self.popen.stdin, self.errors):
            if file is not None:
                file.close()


def run_processes(count: int, command: Sequence[str]) -> Ended:
    """Run ``command`` as ``count`` processes that share a run, until all have ended.

    The first one has the standard output and error of this process, the others are quiet. Ctrl-C, SIGTERM and SIGHUP are
    passed on once, so that the state is saved; a second one ends everything at once. Where one fails, the others end.

    Raises:
        ConfigError: this process is one of several itself.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"--processes {count} starts its processes itself; leave it out under torchrun, which has started "
            f"{os.environ['WORLD_SIZE']} already"
        )
    port, processes = _free_port(), list[_Process]()
    with _received_signals() as received:
        try:
            for rank in range(count):
                processes.append(_start(rank, count, port, command))
            _wait(processes, received)
            return _ended(processes, received)
        finally:
            for process in processes:
                process.release()


def end_with_launcher() -> None:
    """In a process of ``run_processes``: do as on SIGTERM when the process that started it is no longer there."""
    if LAUNCHED in os.environ:
        end_with_input(signal.SIGTERM)


def end_with_input(number: signal.Signals) -> None:
    """From now on, do as on signal ``number`` when standard input ends: a pipe that the process which started this one
    holds open, and which is closed on every system when that process is gone."""

    def wait() -> None:
        os.read(0, 1)  # The pipe has an end, and nothing else.
        if os.name == "nt":
            signal.raise_signal(number)
        else:  # To the process: its main thread may be asleep.
            os.kill(os.getpid(), number)

    threading.Thread(target=wait, name="sdlora-launcher", daemon=True).start()


def described(rank: int, count: int, port: int) -> dict[str, str]:
    """The variables that make a process number ``rank`` of ``count`` on this machine; see ``processes``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHED: "1",
        **({"USE_LIBUV": "0"} if os.name == "nt" else {}),  # torch for Windows is built without it.
    }


def _start(rank: int, count: int, port: int, command: Sequence[str]) -> _Process:
    errors = tempfile.TemporaryFile() if rank else None  # noqa: SIM115 - read when the process has ended
    popen = subprocess.Popen(
        command,
        env=described(rank, count, port),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if rank else None,
        stderr=errors,
        start_new_session=os.name != "nt",  # A terminal's Ctrl-C reaches this process alone, which passes it on once.
    )
    return _Process(rank=rank, popen=popen, errors=errors)


def _wait(processes: Sequence[_Process], received: Sequence[int]) -> None:
    """Until all have ended, pass on the signals that are ``received``, and end all where one has failed."""
    passed, deadline = 0, float("inf")
    while _running(processes):
        if len(received) > passed:
            passed += 1
            for process in processes:
                if passed > 1:
                    process.kill()
                elif os.name != "nt":  # On Windows a console's Ctrl-C reaches every process by itself.
                    process.close()
        failed = any(process.popen.returncode for process in processes)
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + PATIENCE
            for process in processes:
                if not received:
                    process.close()
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(POLL_EVERY)


def _running(processes: Sequence[_Process]) -> list[_Process]:
    return [process for process in processes if process.runs]


def _ended(processes: Sequence[_Process], received: Sequence[int]) -> Ended:
    main, codes = processes[0], [process.popen.returncode for process in processes]
    if codes[0] == 0 and (received or not any(codes)):  # The run was complete when the signal came.
        return Ended(code=0)
    if received:
        said = () if codes[0] > 0 else ("interrupted; run the same command to resume from the newest checkpoint",)
        return Ended(code=128 + received[0], problems=said)
    if main.failed_itself and codes[0] > 0:  # It has said so, and what others say is the same.
        return Ended(code=codes[0])
    failed = [process for process in processes if process.failed_itself] or list(processes)
    problems = {text: None for process in failed for text in _problems(process, len(processes))}
    return Ended(code=1, problems=tuple(problems))


def _problems(process: _Process, count: int) -> list[str]:
    who, code = f"rank {process.rank} of {count} processes", process.popen.returncode
    if code < 0:
        name = signal.Signals(-code).name
        full = "; if the memory was full, start fewer processes or lower train.batch_size" if name == "SIGKILL" else ""
        return [f"{who} was killed by {name}{full}; run the same command to resume from the newest checkpoint"]
    lines = []
    if process.errors is not None:
        process.errors.seek(0)
        lines = process.errors.read().decode("utf-8", "replace").splitlines()
    return [f"{who}: {problem}" for problem in printed_problems(lines)] or [
        f"{who} ended with exit code {code}",
        *lines[-SHOWN_LINES:],
    ]


@contextmanager
def _received_signals() -> Generator[list[int]]:
    """Within the block, in the main thread, Ctrl-C, SIGTERM and SIGHUP are added to the list and do nothing else.

    Those that are ignored, as under nohup, stay so.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none.
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, hang_up)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN
    ]

    def on_signal(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
