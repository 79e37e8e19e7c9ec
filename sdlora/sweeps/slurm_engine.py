"""Runs as jobs of Slurm, by submitit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .jobs import Ended, Job
from .processes import LeashedProcess, wait_for_end
from .remote import RemoteHandle

_LOG_FOLDER = "slurm"
"""Folder within that of the sweep for what submitit writes."""
_MINUTES = 240
"""Time limit of a job where none is stated. A run that needs more is queued again, and resumes."""
_TIMES = 1000
"""Times that a job is queued again, at most."""


class SlurmEngine:
    """Submits each run as one job, which is queued again when it is preempted or its time is over."""

    def __init__(self, options: Mapping[str, Any], folder: Path, processes: int = 1):
        """
        Args:
            options: what submitit's ``update_parameters`` takes; ``cluster = "local"`` runs jobs on this machine.
            folder: that of the sweep.
            processes: GPUs and processors of a job where more than one, and where the options do not say it.

        Raises:
            ConfigError: there is no Slurm, or submitit does not know an option.
        """
        import submitit

        shared = {"gpus_per_node": processes, "cpus_per_task": processes} if processes > 1 else {}
        options = {"timeout_min": _MINUTES, "name": "sdlora", **shared, **options}
        cluster = str(options.pop("cluster", "slurm"))
        try:
            self._executor = submitit.AutoExecutor(
                (folder / _LOG_FOLDER).absolute(), cluster=cluster, slurm_max_num_timeout=_TIMES
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Options of Slurm mean nothing to "local".
                self._executor.update_parameters(**options)
        except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
            raise ConfigError(f"--engine slurm: {str(error).splitlines()[0]}") from None

    def submit(self, job: Job) -> SlurmHandle:
        return SlurmHandle(job, self._executor)

    def close(self) -> None:
        pass


class SlurmHandle(RemoteHandle):
    """A job in the queue."""

    apart = 2.0  # Each looks for a file, often on a disk that many machines share.

    def __init__(self, job: Job, executor: Any):
        super().__init__(job)
        self._withdrawn = False
        try:
            self._submitted = executor.submit(SlurmRun(), job)
        except Exception as error:  # submitit has its own kinds, for what sbatch prints.
            raise OSError(None, f"Slurm: {str(error).strip().splitlines()[0]}") from error

    @property
    def job_id(self) -> str:
        """Its number in the queue."""
        return self._submitted.job_id

    def _look(self) -> Ended | None:
        if self._withdrawn:
            return Ended(code=None, seconds=0.0, note="withdrawn from the queue")
        if not self._submitted.done():
            return None
        try:
            return self._submitted.result()
        except Exception as error:  # What the job raised, or submitit's own for one that left no result.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Ended(code=None, seconds=0.0, note=f"Slurm: {lines[0]}")

    def _withdraw(self) -> None:
        self._submitted.cancel(check=False)
        self._withdrawn = True


class SlurmRun:
    """What a job of Slurm calls; submitit calls ``checkpoint`` before the job is ended to be queued again."""

    def __init__(self) -> None:
        self._process: LeashedProcess | None = None

    def __call__(self, job: Job) -> Ended:
        """Run ``job`` to its end."""
        self._process = LeashedProcess(job)
        return wait_for_end(self._process, job)

    def checkpoint(self, job: Job) -> Any:
        """Let ``job`` save and stop, and say what is to be queued: the same again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.stop()
        return DelayedSubmission(SlurmRun(), job)
