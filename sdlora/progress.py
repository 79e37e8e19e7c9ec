"""Where long work reports its progress, and where it is asked to stop."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from .errors import Interrupted


class Progress(Protocol):
    """Receives the reports of long work."""

    def start(self, task: str, total: int, done: int = 0) -> None:
        """A task of ``total`` units starts, ``done`` of which were done earlier."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """``count`` more units are done; ``note`` is shown beside the bar."""


class Silence:
    """Shows nothing."""

    def start(self, task: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, count: int = 1, note: str = "") -> None:
        pass

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Bar:
    """A bar on standard error with count, rate, time left and a note, drawn by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task = None

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._task = self._progress.add_task(task, total=total, completed=done, note="", rate="")

    def advance(self, count: int = 1, note: str = "") -> None:
        if self._task is None:
            return
        self._progress.advance(self._task, count)
        speed = self._progress.tasks[-1].speed
        self._progress.update(self._task, rate=f"{speed:.2f}/s" if speed else "")
        if note:
            self._progress.update(self._task, note=note)

    def __enter__(self) -> Bar:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, value, trace)


@dataclass(frozen=True, kw_only=True)
class ProgressUpdate:
    """One report of long work: ``done`` of ``total`` units of ``task``, and a note such as the loss."""

    task: str
    done: int
    total: int
    note: str


class CallbackProgress:
    """Calls a function with each report: for a notebook, a web page or a log."""

    def __init__(self, callback: Callable[[ProgressUpdate], None]):
        self._callback = callback
        self._last = ProgressUpdate(task="", done=0, total=0, note="")

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._report(ProgressUpdate(task=task, done=done, total=total, note=""))

    def advance(self, count: int = 1, note: str = "") -> None:
        last = self._last
        done, note = last.done + count, note or last.note
        self._report(ProgressUpdate(task=last.task, done=done, total=last.total, note=note))

    def _report(self, update: ProgressUpdate) -> None:
        self._last = update
        self._callback(update)


def progress_bar() -> Bar | Silence:
    """A bar where standard error is a terminal, else ``Silence``."""
    return Bar() if sys.stderr.isatty() else Silence()


@contextmanager
def progress_or_bar(progress: Progress | None) -> Generator[Progress]:
    """``progress`` itself, or, where it is None, a bar for the length of the block."""
    if progress is not None:
        yield progress
        return
    with progress_bar() as bar:
        yield bar


def raise_if_stopped(stop: threading.Event | None, message: str) -> None:
    """Raise ``Interrupted`` with ``message`` where ``stop`` was set."""
    if stop is not None and stop.is_set():
        raise Interrupted(message)
