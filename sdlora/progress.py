"""Where long work reports its progress, and where it is asked to stop."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TextIO

from .errors import Interrupted


class Progress(Protocol):
    """Receives the reports of long work."""

    def start(self, task: str, total: int, done: int = 0) -> None:
        """A task of ``total`` units starts, ``done`` of which were done earlier."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """``count`` more units are done; ``note`` is shown beside the bar."""


class Stop(Protocol):
    """Says whether to stop; a ``threading.Event`` is one."""

    def is_set(self) -> bool:
        """Whether to stop now."""


class Silence:
    """Shows nothing."""

    def start(self, task: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, count: int = 1, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        """Shows nothing."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Bar:
    """A bar on standard error with count, rate, time left and a note, drawn by rich. It appears with the first task."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True)
        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            # What is printed meanwhile on standard output stays there.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = None
        self._handlers: list[tuple[logging.StreamHandler, TextIO]] = []

    def start(self, task: str, total: int, done: int = 0) -> None:
        if not self._progress.live.is_started:
            self._begin()
        self._task = self._progress.add_task(task, total=total, completed=done, note="", rate="")

    def advance(self, count: int = 1, note: str = "") -> None:
        if self._task is None:
            return
        self._progress.advance(self._task, count)
        speed = self._progress.tasks[-1].speed
        self._progress.update(self._task, rate=f"{speed:.2f}/s" if speed else "")
        if note:
            self._progress.update(self._task, note=note)

    def say(self, line: str) -> None:
        """Print ``line`` above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _begin(self) -> None:
        """Show the bar; what is logged is printed above it from now on."""
        before = sys.stderr
        self._progress.start()
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                self._handlers.append((handler, before))
                handler.setStream(sys.stderr)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()


class NotebookBar:
    """A bar in the output of a notebook's cell, replaced in place by IPython's own display."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._task: Task | None = None
        self._shown = float("-inf")
        self._handle: Any = None

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._keep()
        self._task = Task(name=task, total=total, first=done)
        self._show()

    def advance(self, count: int = 1, note: str = "") -> None:
        if self._task is None:
            return
        self._task.advance(count, note)
        if time.monotonic() - self._shown > _REDRAWN or self._task.done >= self._task.total:
            self._show()

    def say(self, line: str) -> None:
        """Print ``line`` below the bar."""
        print(line, file=sys.stderr)

    def _keep(self) -> None:
        if self._task is not None:
            self._lines.append(self._task.as_bar())

    def _show(self) -> None:
        from IPython.display import display

        self._shown = time.monotonic()
        drawn = "\n".join([*self._lines, *([self._task.as_bar()] if self._task else ())])
        data = {"text/plain": drawn}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def __enter__(self) -> NotebookBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._show()


class Lines:
    """Plain lines on standard error, for a log: at the start and the end of each task, and between every tenth of it or
    every 30 s.

    A task that takes less than ten seconds at the beginning is not reported: a mistake is reported in one line. What
    follows the first ``say`` always is.
    """

    def __init__(self) -> None:
        self._task: Task | None = None
        self._printed_at = self._printed_done = 0.0
        self._held, self._hold = "", True
        self._lock, self._timer = threading.RLock(), None

    def start(self, task: str, total: int, done: int = 0) -> None:
        with self._lock:
            self._finish()
            self._task = Task(name=task, total=total, first=done)
            if total > done:
                self._print(str(self._task))

    def advance(self, count: int = 1, note: str = "") -> None:
        with self._lock:
            task = self._task
            if task is None:
                return
            task.advance(count, note)
            since, share = time.monotonic() - self._printed_at, (task.done - self._printed_done) / max(1, task.total)
            if task.done >= task.total or since >= _LINE_EVERY or (share >= _LINE_SHARE and since >= _LINE_APART):
                self._print(str(task))

    def say(self, line: str) -> None:
        """Print ``line``, and from now on every task."""
        with self._lock:
            self._release()
            self._hold = False
            print(line, file=sys.stderr, flush=True)

    def _print(self, line: str) -> None:
        task = self._task
        assert task is not None
        self._printed_at, self._printed_done = time.monotonic(), task.done
        if not self._hold:
            print(line, file=sys.stderr, flush=True)
            return
        self._held = line
        if self._timer is None:
            self._timer = threading.Timer(_HELD, self._release)
            self._timer.daemon = True
            self._timer.start()

    def _release(self) -> None:
        """Print the line that is held back; the task's other lines are not held back."""
        with self._lock:
            self._cancel()
            if self._held:
                print(self._held, file=sys.stderr, flush=True)
                self._held = ""
                self._hold = False

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _finish(self) -> None:
        """The end of a task: a quick one is forgotten, one that was stopped says how far it came."""
        self._cancel()
        task, self._held = self._task, ""
        if task is not None and not self._hold and task.done != self._printed_done:
            self._print(str(task))
        self._task = None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._finish()


class Task:
    """Counts one task, and spells it."""

    def __init__(self, *, name: str, total: int, first: int):
        self.name, self.total, self.done, self._first = name, total, first, first
        self._note, self._began = "", time.monotonic()

    def advance(self, count: int, note: str) -> None:
        self.done += count
        self._note = note or self._note

    def __str__(self) -> str:
        return ", ".join([f"{self.name}: {self.done} of {self.total}", *self._facts()])

    def as_bar(self) -> str:
        """As one line with a bar."""
        full = round(_BAR * self.done / max(1, self.total))
        bar = _FULL * full + _EMPTY * (_BAR - full)
        return "  ".join([f"{self.name}  {bar}  {self.done}/{self.total}", *self._facts()])

    def _facts(self) -> list[str]:
        """Note, rate, and the time that is left or was taken."""
        seconds, count = time.monotonic() - self._began, self.done - self._first
        facts = [self._note] if self._note else []
        if count and seconds > 0:
            facts.append(f"{count / seconds:.2f}/s")
            left = timedelta(seconds=round((self.total - self.done) * seconds / count))
            facts.append(f"{left} left" if self.done < self.total else f"{timedelta(seconds=round(seconds))} in all")
        return facts


_BAR, _FULL, _EMPTY = 30, "█", "░"
"""Characters in a bar of a notebook, and what they are."""
_REDRAWN = 0.2
"""Seconds between two states of a bar in a notebook."""
_LINE_EVERY, _LINE_SHARE, _LINE_APART = 30.0, 0.1, 1.0
"""Seconds after which a line is due; share of a task after which one is; seconds between two of those at least."""
_HELD = 10.0
"""Seconds for which the first line is held back."""


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


def progress_bar() -> Bar | NotebookBar | Lines:
    """A bar where standard error is a terminal or the output of a notebook, plain lines elsewhere."""
    if sys.stderr is not None and sys.stderr.isatty():
        return Bar()
    return NotebookBar() if _in_notebook() else Lines()


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@contextmanager
def progress_or_bar(progress: Progress | None) -> Generator[Progress]:
    """``progress`` itself, or, where it is None, ``progress_bar()`` for the length of the block."""
    if progress is not None:
        yield progress
        return
    with progress_bar() as bar:
        yield bar


def raise_if_stopped(stop: Stop | None, message: str) -> None:
    """Raise ``Interrupted`` with ``message`` where ``stop`` was set."""
    if stop is not None and stop.is_set():
        raise Interrupted(message)
