"""Jobs as processes of this machine, each on a leash (``sdlora.sweeps.leash``)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from .jobs import ANSWER_NAME, LOG_NAME, LOOK_EVERY, Ended, Job

STOP_NAME = "stop"
"""File in the folder of a job on another machine that asks it to stop."""


class LeashedProcess:
    """A job that runs; it saves and stops when it is cancelled or this process ends."""

    def __init__(self, job: Job):
        """Start it. Raises ``OSError`` where that cannot be done."""
        self._began = time.monotonic()
        environment = {**os.environ, **_package_path(), **job.environment}
        with (job.folder / LOG_NAME).open("ab") as log, (job.folder / ANSWER_NAME).open("wb") as answer:
            self._process = subprocess.Popen(
                job.command,
                cwd=job.folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=answer,
                stderr=log,
                # Ctrl-C in a terminal reaches a whole group of processes; twice would end it before it has saved.
                start_new_session=sys.platform != "win32",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self._ended: Ended | None = None

    def poll(self) -> Ended | None:
        if self._ended is None and (code := self._process.poll()) is not None:
            self.cancel()
            self._ended = Ended(code=code, seconds=time.monotonic() - self._began)
        return self._ended

    def cancel(self) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def stop(self) -> None:
        """Ask it to save and stop, and wait until it has."""
        self.cancel()
        while self.poll() is None:
            time.sleep(LOOK_EVERY)


def run_job(job: Job) -> Ended:
    """Run ``job`` to its end, on whatever machine this is called; see ``wait_for_end``."""
    return wait_for_end(LeashedProcess(job), job)


def wait_for_end(process: LeashedProcess, job: Job) -> Ended:
    """Wait until ``process`` has ended, and ask it to stop once the file ``STOP_NAME`` is in the folder of ``job``.

    Any exception that arrives, such as that of a cluster which takes the machine away, stops it after a save.
    """
    try:
        while (end := process.poll()) is None:
            if (job.folder / STOP_NAME).exists():
                process.cancel()
            time.sleep(LOOK_EVERY)
        return end
    except BaseException:
        process.stop()
        raise


class LocalEngine:
    """Runs up to ``at_once`` jobs on this machine, each with its share of the processors and a GPU."""

    def __init__(self, at_once: int, devices: tuple[str, ...] = (), processes: int = 1):
        """
        Args:
            devices: names of the GPUs as ``CUDA_VISIBLE_DEVICES`` has them; jobs take them in turn.
            processes: how many processes, and so GPUs, each job has.
        """
        self._devices, self._processes = devices, processes
        self._slots: list[LeashedProcess | None] = [None] * at_once
        self._threads = max(1, (os.cpu_count() or 1) // (at_once * processes))

    def submit(self, job: Job) -> LeashedProcess:
        slot = next(i for i, process in enumerate(self._slots) if process is None or process.poll() is not None)
        environment = {**self._share(slot), **job.environment}
        process = LeashedProcess(Job(name=job.name, folder=job.folder, command=job.command, environment=environment))
        self._slots[slot] = process
        return process

    def close(self) -> None:
        pass

    def _share(self, slot: int) -> dict[str, str]:
        """Variables that give a job its GPU, and its share of the processors where several run."""
        share = {}
        if self._devices:
            first, count = slot * self._processes, min(self._processes, len(self._devices))
            own = (self._devices[(first + i) % len(self._devices)] for i in range(count))
            share["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        if len(self._slots) > 1 and "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(self._threads)
        return share


def _package_path() -> dict[str, str]:
    """The variable by which a process in another folder finds this package, where it is not installed."""
    home = Path(__file__).resolve().parents[2]
    if {"site-packages", "dist-packages"} & set(home.parts):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))}
