"""The course of a sweep: the table is brought up to date as runs start and end."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import printed_problems
from ..progress import Progress, Stop
from .jobs import LOG_NAME, Ended, Job
from .planning import PlannedRun
from .results import RunResult, SweepReport, write_results
from .run_folder import answer_of, check_same, prepare, steps_kept

_INTERRUPTED = (130, 143)
"""Exit codes of a run that has saved and stopped."""
_NOTED, _NOTED_APART = 60, 1.0
"""Characters of a log's last line that are shown beside the bar, and seconds between two of them."""
_TAIL = 4096
"""Bytes at the end of a log that are looked at."""


class Course:
    """Keeps the results of all runs, in memory and in the table; a ``Watcher`` of jobs."""

    def __init__(self, folder: Path, runs: Sequence[PlannedRun], earlier: Mapping[str, RunResult], *, retry: bool):
        """``earlier`` has the results of earlier calls; runs that failed then are run again where ``retry``.

        Raises:
            ResumeError: an earlier call left something of other settings.
        """
        check_same(runs)
        self._folder, self._runs = folder, {run.name: run for run in runs}
        self._results = {run.name: _known(run, earlier.get(run.name), folder, retry=retry) for run in runs}
        self._logs: dict[str, int] = {}
        self._next_note = 0.0
        self._progress: Progress | None = None
        self._stop: Stop | None = None

    @property
    def report(self) -> SweepReport:
        """The results so far."""
        return SweepReport(folder=self._folder, runs=tuple(self._results.values()))

    @property
    def due(self) -> tuple[PlannedRun, ...]:
        """Runs that are to be started or resumed."""
        return tuple(self._runs[name] for name, result in self._results.items() if result.state == "waiting")

    def begin(self, progress: Progress, stop: Stop) -> None:
        """Report to ``progress`` from now on; runs that end after ``stop`` was set were stopped by it."""
        self._progress, self._stop = progress, stop
        for run in self.due:
            prepare(run)
        self.write()
        total = len(self._results)
        progress.start("Runs", total, total - len(self.due))

    def write(self) -> None:
        """Write the table as it is. Raises ``OSError`` where that cannot be done."""
        write_results(self.report)

    def started(self, job: Job) -> None:
        log = job.folder / LOG_NAME
        self._logs[job.name] = log.stat().st_size if log.exists() else 0
        self._set(replace(self._results[job.name], state="running", message=""))

    def running(self, jobs: Sequence[Job]) -> None:
        assert self._progress is not None
        if time.monotonic() < self._next_note:
            return
        self._next_note = time.monotonic() + _NOTED_APART
        first = jobs[0]
        line = _last_line(first.folder / LOG_NAME, self._logs.get(first.name, 0))
        more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
        self._progress.advance(0, note=f"{first.name}{more}{f': {line[:_NOTED]}' if line else ''}")

    def ended(self, job: Job, end: Ended) -> None:
        assert self._progress is not None
        assert self._stop is not None
        run, before = self._runs[job.name], self._results[job.name]
        seconds = before.seconds + end.seconds
        answer = answer_of(run) if end.code == 0 else None
        if answer is not None:
            result = _done(run, answer, self._folder, seconds)
        elif end.code in _INTERRUPTED or self._stop.is_set():
            result = replace(before, state="stopped", steps=steps_kept(run), seconds=seconds)
        else:
            why = _why(job.folder / LOG_NAME, self._logs.get(job.name, 0), end)
            result = replace(before, state="failed", steps=steps_kept(run), seconds=seconds, message=why)
        self._set(result)
        self._progress.advance(1, note=f"{result.run} {result.state}")
        if say := getattr(self._progress, "say", None):
            say(in_words(result))

    def _set(self, result: RunResult) -> None:
        self._results[result.run] = result
        self.write()


def in_words(result: RunResult) -> str:
    """One run in a line."""
    facts = [result.state]
    if result.state == "done":
        facts += [f"loss {result.loss:.4f}"] if result.loss is not None else []
        facts += [f"validation loss {result.validation_loss:.4f}"] if result.validation_loss is not None else []
        facts.append(f"{result.seconds:.0f} s")
    elif result.state == "stopped":
        facts.append(f"{result.steps} steps are kept")
    return f"{result.run}: {', '.join(facts)}{f': {result.message}' if result.message else ''}"


def _known(run: PlannedRun, earlier: RunResult | None, folder: Path, *, retry: bool) -> RunResult:
    """What is known of ``run`` before this call does anything."""
    seconds = earlier.seconds if earlier else 0.0
    if (answer := answer_of(run)) is not None:
        return _done(run, answer, folder, seconds)
    waiting = RunResult(run=run.name, state="waiting", settings=run.settings, steps=steps_kept(run), seconds=seconds)
    if earlier is not None and earlier.state == "failed" and not retry:
        return replace(waiting, state="failed", message=earlier.message)
    return waiting


def _done(run: PlannedRun, answer: Mapping[str, Any], folder: Path, seconds: float) -> RunResult:
    loss = _logged_loss(run.output.with_suffix(".log.csv"), answer["steps"])
    return RunResult(
        run=run.name,
        state="done",
        settings=run.settings,
        steps=answer["steps"],
        loss=answer.get("loss") if loss is None else loss,
        validation_loss=answer.get("validation_loss"),
        seconds=seconds,
        file=run.output.relative_to(folder).as_posix(),
        message=answer.get("warning") or "",
    )


def _logged_loss(log: Path, steps: int) -> float | None:
    """Mean loss over the last 10 % of ``steps`` in a log, also those that an earlier call did; None without a log."""
    from ..training.course import tail_length

    try:
        with log.open(encoding="utf-8", newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return math.fsum(losses[-tail_length(steps) :]) / tail_length(steps) if len(losses) == steps else None


def _why(log: Path, start: int, end: Ended) -> str:
    """Why a job failed: the errors that it printed, or the last line, or what the engine says."""
    lines = _lines(log, start)
    if problems := printed_problems(lines):
        return "; ".join(problems)
    code = "" if end.code is None else f"ended with exit code {end.code}"
    return "; ".join(filter(None, (end.note, code, lines[-1] if lines else "")))


def _last_line(log: Path, start: int) -> str:
    lines = _lines(log, start)
    return lines[-1] if lines else ""


def _lines(log: Path, start: int) -> list[str]:
    """Lines at the end of ``log``, from byte ``start`` on, that are not empty."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - _TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]
