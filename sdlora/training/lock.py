"""One run for one output: a small file beside the output names the process that writes it."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ResumeError
from ..files import PARTIAL_SUFFIX, printable, write_new

_ATTEMPTS = 5
CLOCK_TOLERANCE = 60.0
"""Seconds by which the clock may be set while a run lasts."""
_held: set[Path] = set()
"""Locks of this process."""


@contextmanager
def locked(output: Path, choice: str = "output.path") -> Generator[None]:
    """Hold ``NAME.lock`` beside ``output`` for the length of the block; ``choice`` is what chooses another output.

    The lock of a process that has ended on this machine is replaced. It holds the process and the machine, and nothing
    else does.

    Raises:
        ResumeError: another run holds it; the message says which.
        OSError: it cannot be written.
    """
    lock = output.with_suffix(".lock").absolute()
    lock.parent.mkdir(parents=True, exist_ok=True)
    own = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())})
    for _ in range(_ATTEMPTS):
        if write_new(lock, own.encode()):
            break
        _refuse_or_remove(lock, output, choice)
    else:
        raise ResumeError(f"{printable(output)}: another run is starting to write it; choose another {choice}")
    _held.add(lock)
    try:
        yield
    finally:
        _held.discard(lock)
        with suppress(OSError):
            lock.unlink()


def _refuse_or_remove(lock: Path, output: Path, choice: str) -> None:
    """Remove ``lock`` if its process has ended. Raises ``ResumeError`` if not, or if that cannot be known."""
    try:
        found = lock.read_bytes()
    except FileNotFoundError:
        return
    try:
        holder = json.loads(found)
        pid, host, started = int(holder["pid"]), str(holder["host"]), float(holder["started"])
    except (ValueError, KeyError, TypeError):
        raise ResumeError(
            f"{printable(output)}: {printable(lock)} says that another run writes it; remove that file if none does"
        ) from None
    if host != socket.gethostname():
        raise ResumeError(
            f"{printable(output)}: process {pid} on {host} is writing it; wait for it, choose another {choice}, or "
            f"remove {printable(lock)} if that process has ended"
        )
    if _runs(pid, started) and (pid != os.getpid() or lock in _held):
        raise ResumeError(
            f"{printable(output)}: process {pid} on this machine is writing it; wait for it or choose another {choice}"
        )
    _remove_left(lock, found)


def _remove_left(lock: Path, found: bytes) -> None:
    """Remove ``lock`` if it still holds ``found``.

    It is renamed first: of several runs that saw the same lock one takes it, and none removes what another has written.
    """
    taken = lock.with_name(f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    with suppress(OSError):
        lock.rename(taken)
        content = taken.read_bytes()
        if content != found:
            write_new(lock, content)
        taken.unlink()


def _runs(pid: int, started: float) -> bool:
    """Whether process ``pid`` is the one that started then, not a later one with its number."""
    now = _started(pid)
    return now is not None and abs(now - started) < CLOCK_TOLERANCE


def _started(pid: int) -> float | None:
    """When process ``pid`` of this machine started, in seconds since 1970; None where it has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
