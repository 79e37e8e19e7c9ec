"""From a sweep file to runs that can start: each is checked as ``sdlora train`` checks it, before any is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.loading import load_stated
from ..config.locations import located
from ..config.resolve import resolve_config
from ..config.sections import SECTION_NAMES, Config
from ..config.toml_file import Location
from ..config.written import Written
from ..data.findings import raise_errors
from ..errors import ConfigError, SdloraError
from ..lint.run import examine_dataset
from ..progress import Progress, Stop, raise_if_stopped
from .naming import Variant, variants_of
from .sweep_file import SweepFile, flat

CONFIG_NAME = "run.toml"
"""Name of the configuration in the folder of a run."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep, whose configuration was checked."""

    name: str
    settings: Mapping[str, Any]
    """``section.key`` -> value as TOML has it, of what sets it apart from the other runs."""
    folder: Path
    """Its own: configuration, log, answer and output are in it."""
    config: Config
    """With ``output.path`` in ``folder``, and paths that lead there from the working folder."""

    @property
    def output(self) -> Path:
        """The LoRA file that it writes."""
        return Path(self.config.output.path)


def plan_sweep(sweep: SweepFile, out: Path, overrides: Sequence[str] = ()) -> tuple[PlannedRun, ...]:
    """The runs of a sweep, in order; names, settings and their values are checked.

    Args:
        out: the folder of all runs.
        overrides: ``section.key=value`` for every run.

    Raises:
        ConfigError: with one line for each fault, and which runs have it where not all have.
    """
    _check_overrides(sweep, overrides)
    runs, problems = [], Problems()
    variants = variants_of(sweep)
    for variant in variants:
        folder = out / variant.name
        try:
            config = _config_of(sweep, variant, folder / f"{variant.name}.safetensors", overrides)
        except ConfigError as error:
            problems.add(variant.name, error)
            continue
        runs.append(PlannedRun(name=variant.name, settings=variant.settings, folder=folder, config=config))
    problems.raise_any(len(variants))
    return tuple(runs)


def check_runs(runs: Sequence[PlannedRun], progress: Progress, stop: Stop | None) -> None:
    """Examine the images of every run and plan it, as ``sdlora train`` does before it loads a model.

    Runs on the same images share one examination.

    Raises:
        SdloraError: with one line for each fault, and which runs have it where not all have.
        Interrupted: ``stop`` was set.
    """
    groups: dict[str, list[PlannedRun]] = {}
    problems = Problems()
    for run in runs:
        try:
            groups.setdefault(_dataset_key(run.config), []).append(run)
        except SdloraError as error:
            problems.add(run.name, error)
    for group in groups.values():
        try:
            dataset = examine_dataset(group[0].config, progress=progress)
            raise_errors(dataset.findings)
        except SdloraError as error:
            for run in group:
                problems.add(run.name, error)
            continue
        from ..training.plan import plan_run  # It brings torch: faults of the images are found before.

        for run in group:
            raise_if_stopped(stop, "stopped before the first run; run the same command to start")
            try:
                plan_run(run.config, dataset)
            except SdloraError as error:
                problems.add(run.name, error)
    problems.raise_any(len(runs))


class Problems:
    """Faults of the runs of a sweep; one that all have is reported once."""

    def __init__(self) -> None:
        self._runs: dict[str, list[str]] = {}
        self._kinds: set[type[SdloraError]] = set()

    def add(self, name: str, error: SdloraError) -> None:
        """The run ``name`` has the faults of ``error``."""
        self._kinds.add(type(error))
        for problem in error.problems:
            self._runs.setdefault(problem, []).append(name)

    def raise_any(self, runs: int) -> None:
        """Raise the faults of ``runs`` runs, if there are any."""
        if self._runs:
            kind = self._kinds.pop() if len(self._kinds) == 1 else SdloraError
            raise kind([_with_runs(problem, names, runs) for problem, names in self._runs.items()])


def _with_runs(problem: str, names: Sequence[str], runs: int) -> str:
    if len(names) == runs:
        return problem
    more = len(names) - 1
    return f"{problem} (run {names[0]}{f' and {more} more' if more else ''})"


def _dataset_key(config: Config) -> str:
    """What an examination of images depends on: two runs with the same key have the same images."""
    return resolve_config(config).data.model_dump_json() + config.base.model_dump_json()


def _check_overrides(sweep: SweepFile, overrides: Sequence[str]) -> None:
    """Whether settings for every run leave the sweep's own alone.

    Raises:
        ConfigError: one is in the grid, in a run, or would put all outputs into one file.
    """
    own = {axis.key for axis in sweep.grid} | {key for entry in sweep.entries for key in entry.settings}
    problems = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in own:
            problems.append(f"{override}: {sweep.file} tries values of {key}; leave it out, or change the file")
        elif key == "output.path":
            problems.append(f"{override}: each run writes into a folder of its own; name the folder of all with --out")
    if problems:
        raise ConfigError(problems)


def _config_of(sweep: SweepFile, variant: Variant, output: Path, overrides: Sequence[str]) -> Config:
    """The configuration of one run: the named file, then the sweep's sections, then its own settings."""
    tables = _merged(sweep.base.tables, sweep.tables, variant.settings)
    if isinstance(section := tables.setdefault("output", {}), dict):
        section.setdefault("log", True)  # The table of results has the loss of the last steps from it.
    own = flat(sweep.tables).keys() | variant.settings.keys()
    base = flat(sweep.base.tables).keys() - own

    def where(location: Location) -> str:
        return _place(sweep, variant, location)

    everything = [*overrides, f"output.path={json.dumps(str(output), ensure_ascii=False)}"]
    config = load_stated(Written(tables=tables, place=where, folder=None), everything).config
    # Relative paths go by the folder of the file that states them, those of overrides by the working folder.
    overridden = {override.partition("=")[0].strip() for override in everything}
    config = located(config, sweep.base.folder, own | overridden)
    return located(config, sweep.file.parent, base | overridden)


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of a configuration in which each key has the value of the last layer that states it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            section, _, key = name.partition(".")
            inner = {key: value} if key else value
            if isinstance(inner, dict) and isinstance(merged.get(section, {}), dict):
                merged[section] = {**merged.get(section, {}), **inner}
            else:
                merged[section] = inner
    return merged


def _place(sweep: SweepFile, variant: Variant, location: Location) -> str:
    """Where ``location`` of a run's configuration is stated."""
    names = [part for part in location if isinstance(part, str)]
    key = ".".join(names[:2]) if names and names[0] in SECTION_NAMES else ".".join(names[:1])
    if any(axis.key == key for axis in sweep.grid):
        return sweep.place(["grid", *location])
    if key in variant.settings and variant.entry is not None:
        return sweep.place(["runs", variant.entry, *location])
    if key in flat(sweep.tables) or key in sweep.tables:
        return sweep.place(location)
    if key in flat(sweep.base.tables) or key in sweep.base.tables:
        return sweep.base.place(location)
    return str(sweep.file)
