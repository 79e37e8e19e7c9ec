"""Jobs whose commands are small processes of Python, for tests of engines, and a watcher that writes down what it sees."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sdlora.sweeps.jobs import Ended, Job

LEASHED = "from sdlora.sweeps.leash import hold; hold()\n"
WAITING = (
    LEASHED
    + """
import pathlib, sys, time
try:
    pathlib.Path("started").touch()
    time.sleep(120)
except KeyboardInterrupt:
    pathlib.Path("saved").touch()
    sys.exit(130)
"""
)
"""Saves when it is interrupted, as a training does."""


def job(folder: Path, name: str, code: str) -> Job:
    (folder / name).mkdir(exist_ok=True)
    return Job(name=name, folder=folder / name, command=(sys.executable, "-c", code))


class Seen:
    """Writes down what a watcher is called with."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: dict[str, Ended] = {}
        self.together = 0

    def started(self, job: Job) -> None:
        self.begun.append(job.name)

    def running(self, jobs: Sequence[Job]) -> None:
        self.together = max(self.together, len(jobs))

    def ended(self, job: Job, end: Ended) -> None:
        self.ends[job.name] = end

    @property
    def codes(self) -> dict[str, int | None]:
        return {name: end.code for name, end in self.ends.items()}


class StopWhen:
    """Set once every one of ``files`` exists."""

    def __init__(self, *files: Path):
        self._files = files

    def is_set(self) -> bool:
        return all(file.exists() for file in self._files)
