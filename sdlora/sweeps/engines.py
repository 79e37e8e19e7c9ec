"""Where runs are trained: this machine, a cluster of Ray, or Slurm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from ..config.toml_text import shown
from ..errors import ConfigError
from .jobs import Engine
from .processes import LocalEngine

EngineName = Literal["local", "ray", "slurm"]


@dataclass(frozen=True, kw_only=True)
class ChosenEngine:
    """An engine, and how many runs it gets at the same time."""

    engine: Engine
    at_once: int


def engine_for(
    name: str, options: Mapping[str, Mapping[str, Any]], *, jobs: int | None, processes: int, runs: int, folder: Path
) -> ChosenEngine:
    """The engine ``name`` for a number of ``runs``.

    Args:
        options: name of an engine -> its table of the sweep file.
        jobs: runs at the same time, where that is given.
        processes: processes of each run.
        folder: that of the sweep, which every machine sees under the same path.

    Raises:
        ConfigError: the cluster cannot be reached, or does not know an option.
    """
    if name == "local":
        at_once = min(jobs or 1, max(1, runs))
        return ChosenEngine(engine=LocalEngine(at_once, visible_devices(), processes), at_once=at_once)
    at_once, own = jobs or max(1, runs), options.get(name, {})
    if name == "ray":
        from .ray_engine import RayEngine

        return ChosenEngine(engine=RayEngine(own, processes), at_once=at_once)
    from .slurm_engine import SlurmEngine

    return ChosenEngine(engine=SlurmEngine(own, folder, processes), at_once=at_once)


_PACKAGES = {"ray": "ray", "slurm": "submitit"}
"""Engine -> the package that it needs; the extra has the engine's name."""


def check_engine(name: str, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the engine ``name`` can be asked for, before anything else is done.

    Raises:
        ConfigError: there is no such engine, its extra is not installed, or an option of Ray is wrong.
    """
    if name not in get_args(EngineName):
        raise ConfigError(f"--engine {name}: expected one of {', '.join(get_args(EngineName))}")
    package = _PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        raise ConfigError(f"--engine {name} needs {package}: pip install 'sdlora[{name}]'")
    if name == "ray":
        from .ray_engine import OPTIONS

        problems = [
            f"[ray] {key} = {shown(value)}: {'wrong type' if key in OPTIONS else 'unknown; expected ' + ', '.join(OPTIONS)}"
            for key, value in options.get("ray", {}).items()
            if not isinstance(value, OPTIONS.get(key, ()))
        ]
        if problems:
            raise ConfigError(problems)


def visible_devices() -> tuple[str, ...]:
    """The GPUs that a process of this machine may use, as ``CUDA_VISIBLE_DEVICES`` names them; none without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part.strip() for part in named.split(",") if part.strip())[: torch.cuda.device_count()]
    return tuple(map(str, range(torch.cuda.device_count())))
