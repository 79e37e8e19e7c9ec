"""Runs as tasks of Ray, on the machines of its cluster. Ray's own API decides where and when."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .jobs import Ended, Job
from .processes import run_job
from .remote import RemoteHandle

_CONNECTING = {"address", "namespace"}
"""Options for ``ray.init``; the others are those of a task."""
OPTIONS = {
    "address": str,
    "namespace": str,
    "num_cpus": (int, float),
    "num_gpus": (int, float),
    "memory": (int, float),
    "resources": dict,
    "max_retries": int,
}
"""Keys of ``[ray]`` and their types."""

_PATIENCE = 10.0
"""Seconds for a cluster to answer."""


class RayEngine:
    """Submits each run as one task; a task whose machine is lost is started again, and its run resumes."""

    def __init__(self, options: Mapping[str, Any], processes: int = 1):
        """Connect to the cluster of ``options["address"]``, or one that is known on this machine, or start one here.

        By default each of the ``processes`` of a run has a processor, and a GPU where there are any.

        Raises:
            ConfigError: it cannot be reached.
        """
        import ray

        self._ray, self._owned = ray, not ray.is_initialized()
        if self._owned:
            connecting = {key: value for key, value in options.items() if key in _CONNECTING}
            try:
                _reach(options.get("address", ""))
                ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False, **connecting)
            except (OSError, ValueError, RuntimeError) as error:
                address = options.get("address", "this machine")
                raise ConfigError(f"--engine ray: no cluster at {address}: {str(error).splitlines()[0]}") from None
        task = {key: value for key, value in options.items() if key not in _CONNECTING}
        task.setdefault("num_cpus", processes)
        task.setdefault("num_gpus", processes if ray.cluster_resources().get("GPU") else 0)
        self._task = ray.remote(run_job).options(**task)

    def submit(self, job: Job) -> RayHandle:
        return RayHandle(job, self._ray, self._task)

    def close(self) -> None:
        if self._owned:
            self._ray.shutdown()


class RayHandle(RemoteHandle):
    """A task."""

    def __init__(self, job: Job, ray: Any, task: Any):
        super().__init__(job)
        self._ray, self._result = ray, task.remote(job)

    def _look(self) -> Ended | None:
        ready, _ = self._ray.wait([self._result], timeout=0)
        if not ready:
            return None
        try:
            return self._ray.get(self._result)
        except self._ray.exceptions.RayError as error:
            return Ended(code=None, seconds=0.0, note=f"Ray: {_first_line(error)}")

    def _withdraw(self) -> None:
        self._ray.cancel(self._result)


def _reach(address: str) -> None:
    """Raise ``OSError`` where nothing answers at ``host:port``: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), _PATIENCE):
            pass


def _first_line(error: Exception) -> str:
    """What an error of Ray says, without the trace of the task."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0]
