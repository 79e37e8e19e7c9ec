"""A job is a command with a folder; an engine runs jobs. ``run_jobs`` knows nothing else of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..progress import Stop

LOG_NAME, ANSWER_NAME = "log.txt", "answer.json"
"""Files in the folder of a job with its standard error, of all attempts, and its standard output, of the last one."""
LOOK_EVERY = 0.1
"""Seconds between two looks at the running jobs."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command to be run in a process of its own."""

    name: str
    folder: Path
    """Absolute; it exists. The command runs in it, and its log and answer are in it."""
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that it has beside those of the process that starts it."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended."""

    code: int | None
    """Exit code of its process; None where there was none, or the engine lost it."""
    seconds: float
    """Time that its process took."""
    note: str = ""
    """What the engine says where it lost the job."""


class Handle(Protocol):
    """A job that was submitted."""

    def poll(self) -> Ended | None:
        """How it ended; None while it waits or runs."""

    def cancel(self) -> None:
        """Ask it to save and stop. It still has to be polled until it has ended. A second call does nothing."""


class Engine(Protocol):
    """Runs jobs somewhere."""

    def submit(self, job: Job) -> Handle:
        """Start ``job``, or put it into a queue. Raises ``OSError`` where it cannot be started."""

    def close(self) -> None:
        """Nothing more is submitted, and all jobs have ended."""


class Watcher(Protocol):
    """Is called as jobs start, run and end."""

    def started(self, job: Job) -> None:
        """``job`` was submitted."""

    def running(self, jobs: Sequence[Job]) -> None:
        """These were submitted and have not ended; called again and again."""

    def ended(self, job: Job, end: Ended) -> None:
        """``job`` has ended."""


def run_jobs(jobs: Sequence[Job], engine: Engine, watcher: Watcher, *, at_once: int, stop: Stop) -> None:
    """Run ``jobs`` in order, at most ``at_once`` at a time, until all have ended; the failure of one stops no other.

    Once ``stop`` is set, no more are started, the running ones are cancelled, and their end is awaited. An exception of the
    watcher does the same before it is raised.
    """
    waiting, running = deque(jobs), dict[str, tuple[Job, Handle]]()
    try:
        while waiting or running:
            if stop.is_set():
                waiting.clear()
                for _, handle in running.values():
                    handle.cancel()
            while waiting and len(running) < at_once:
                _submit(waiting.popleft(), engine, watcher, running)
            for job, handle in list(running.values()):
                if (end := handle.poll()) is not None:
                    del running[job.name]
                    watcher.ended(job, end)
            if running:
                watcher.running([job for job, _ in running.values()])
                time.sleep(LOOK_EVERY)
    finally:
        for _, handle in running.values():
            handle.cancel()
        while any(handle.poll() is None for _, handle in running.values()):
            time.sleep(LOOK_EVERY)


def _submit(job: Job, engine: Engine, watcher: Watcher, running: dict[str, tuple[Job, Handle]]) -> None:
    try:
        handle = engine.submit(job)
    except OSError as error:
        watcher.ended(job, Ended(code=None, seconds=0.0, note=f"cannot be started: {error.strerror or error}"))
        return
    running[job.name] = (job, handle)
    watcher.started(job)
