"""What the engines of clusters share: a job that runs on another machine, and sees the same folders."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import ClassVar

from .jobs import ANSWER_NAME, Ended, Job
from .processes import STOP_NAME


class RemoteHandle(ABC):
    """A job that a cluster has. A running one is asked to stop by a file in its folder, so it can take its time to save
    whatever the cluster does to processes; one that waits is withdrawn."""

    apart: ClassVar[float] = 0.0
    """Seconds between two questions to the cluster."""

    def __init__(self, job: Job):
        self._job, self._next_look = job, 0.0
        self._ended: Ended | None = None
        self._cancelled = False
        for name in (STOP_NAME, ANSWER_NAME):
            (job.folder / name).unlink(missing_ok=True)

    def poll(self) -> Ended | None:
        """How it ended; None while it waits or runs."""
        if self._ended is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + self.apart
            self._ended = self._look()
            if self._ended is not None:
                (self._job.folder / STOP_NAME).unlink(missing_ok=True)
        return self._ended

    def cancel(self) -> None:
        """Ask it to save and stop, once."""
        if self._cancelled or self._ended is not None:
            return
        self._cancelled = True
        (self._job.folder / STOP_NAME).touch()
        if not (self._job.folder / ANSWER_NAME).exists():
            self._withdraw()

    @abstractmethod
    def _look(self) -> Ended | None:
        """How it ended, from the cluster."""

    @abstractmethod
    def _withdraw(self) -> None:
        """Take it out of the queue."""
