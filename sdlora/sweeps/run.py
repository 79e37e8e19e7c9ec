"""The public function ``sweep``: plan all runs, check them, run what is not done, keep the table."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import ConfigError, Interrupted
from ..files import check_target
from ..progress import Progress, Silence, progress_or_bar
from .course import Course
from .engines import ChosenEngine, EngineName, check_engine, engine_for
from .jobs import Job, run_jobs
from .planning import CONFIG_NAME, PlannedRun, check_runs, plan_sweep
from .results import SweepReport, read_results
from .sweep_file import read_sweep


def sweep(
    file: str | Path,
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    engine: EngineName = "local",
    jobs: int | None = None,
    processes: int = 1,
    retry: bool = False,
    only_check: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> SweepReport:
    """Train every run of a sweep file, each in a process and a folder of its own, and keep their results in one table.

    Runs that are done are skipped, half-done ones are resumed. A run that fails stops no other.

    Args:
        file: the sweep file.
        overrides: ``section.key=value`` for every run.
        out: folder of all runs; by default ``out/NAME`` in the working folder, NAME as in ``NAME.toml``.
        engine: where the processes run.
        jobs: runs at the same time; by default one on this machine, and all on a cluster.
        processes: how many processes share each run, as ``--processes`` of ``sdlora train`` has it.
        retry: run those again that failed in an earlier call.
        only_check: check everything, train nothing.
        progress: receives reports; by default a bar in a terminal.
        stop: set it, from any thread, to stop all runs after a save, as Ctrl-C does in the main thread.

    Raises:
        SdloraError: a fault of the input, found before anything is trained. A failure of a run is in the report.
        Interrupted: Ctrl-C or ``stop``; the runs have saved, and the same call goes on.
    """
    path = Path(file).expanduser()
    folder = Path("out") / path.stem if out is None else Path(out).expanduser()
    _check_counts({"--jobs": jobs, "--processes": processes})
    described = read_sweep(path)
    check_engine(engine, described.engines)
    runs = plan_sweep(described, folder, tuple(overrides))
    check_target(folder, "folder")
    course = Course(folder, runs, read_results(folder), retry=retry)
    with progress_or_bar(progress) as reports:
        check_runs(course.due, Silence(), stop)
        if not course.due and not only_check:
            course.write()
        if not course.due or only_check:
            return course.report
        due = len(course.due)
        chosen = engine_for(engine, described.engines, jobs=jobs, processes=processes, runs=due, folder=folder)
        try:
            _train(course, chosen, reports, stop, processes)
        finally:
            chosen.engine.close()
    return course.report


def _check_counts(counts: Mapping[str, int | None]) -> None:
    """Raise ``ConfigError`` where one of ``counts`` is given and not at least 1."""
    wrong = {name: count for name, count in counts.items() if count is not None and count < 1}
    if wrong:
        raise ConfigError([f"{name} {count}: expected a whole number, at least 1" for name, count in wrong.items()])


def _train(
    course: Course, chosen: ChosenEngine, progress: Progress, stop: threading.Event | None, processes: int
) -> None:
    """Train what is due.

    Raises:
        ResumeError: another sweep writes into the folder.
        Interrupted: a signal or ``stop``, after all runs have ended.
    """
    from ..training.interruption import interrupt_flag
    from ..training.lock import locked

    with interrupt_flag(stop) as flag, locked(course.report.folder / "results", "--out"):
        course.begin(progress, flag)
        jobs = [_job(run, processes) for run in course.due]
        run_jobs(jobs, chosen.engine, course, at_once=chosen.at_once, stop=flag)
    report = course.report
    if flag.is_set() and report.count("done") + report.count("failed") < len(report.runs):
        raise Interrupted(
            f"stopped; {report.count('done')} of {len(report.runs)} runs are done; run the same command to go on",
            terminated=flag.terminated,
        )


def _job(run: PlannedRun, processes: int) -> Job:
    shared = ("--processes", str(processes)) if processes > 1 else ()
    command = (sys.executable, "-m", "sdlora.cli.leashed", "train", CONFIG_NAME, "--json", *shared)
    return Job(name=run.name, folder=run.folder.absolute(), command=command)
