"""``SWEEP.toml``: a training configuration, with the values that its runs try."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config.sections import SECTION_NAMES, TOP_LEVEL
from ..config.toml_file import Location, place, read_toml
from ..config.toml_text import shown
from ..config.unknown_keys import near_spelling
from ..config.written import Written
from ..errors import ConfigError

ENGINE_TABLES = ("ray", "slurm")
OWN_KEYS = ("config", "grid", "runs", *ENGINE_TABLES)
"""What a sweep file has beside the sections of a training configuration."""
_FORM = 'expected "section.key" = [values], for example "lora.rank" = [4, 16]'


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One setting, and the values that it takes in turn."""

    key: str
    """``section.key``, or the name of a key above all sections."""
    values: tuple[Any, ...]
    """As TOML has them; at least one, no two the same."""


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One table ``[[runs]]``: a name, and settings that belong together."""

    name: str | None
    settings: Mapping[str, Any]
    """``section.key`` -> value, as TOML has it."""


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """What a sweep file says; its settings are not checked yet."""

    file: Path
    base: Written
    """The configuration that ``config`` names."""
    tables: Mapping[str, Any]
    """Sections of a training configuration in the sweep file itself, which go before those of ``base``."""
    grid: tuple[Axis, ...]
    entries: tuple[RunEntry, ...]
    """The tables ``[[runs]]``; none where there are none."""
    engines: Mapping[str, Mapping[str, Any]]
    """Name of an engine -> its table."""
    place: Callable[[Location], str]
    """Where a key of the sweep file is stated: the file and its line."""


def read_sweep(file: Path) -> SweepFile:
    """Read a sweep file, and the configuration that it names.

    Raises:
        ConfigError: with one line for each fault of its form. Names and values of settings are not checked here.
    """
    tables, text = read_toml(file)
    at = partial(place, str(file), text)
    problems = [*_misspelled(tables, at)]
    base = Written.nothing()
    try:
        base = _base(file, tables.get("config"), at)
    except ConfigError as error:
        problems += error.problems
    grid, entries = tables.get("grid", {}), tables.get("runs", [])
    problems += [*_grid_problems(grid, at), *_entry_problems(entries, at), *_engine_problems(tables, at)]
    if not problems:
        problems += _shared_problems(grid, entries, at)
    if problems:
        raise ConfigError(problems)
    return SweepFile(
        file=file,
        base=base,
        tables={name: value for name, value in tables.items() if name not in OWN_KEYS},
        grid=tuple(Axis(key=key, values=tuple(values)) for key, values in flat(grid).items()),
        entries=tuple(
            RunEntry(name=entry.get("name"), settings=flat({k: v for k, v in entry.items() if k != "name"}))
            for entry in entries
        ),
        engines={name: tables[name] for name in ENGINE_TABLES if name in tables},
        place=at,
    )


def flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """``section.key`` -> value, whether a key is written ``"lora.rank"``, ``lora.rank`` or in a table of its section."""
    settings: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict) and "." not in name:
            settings |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            settings[name] = value
    return settings


def _misspelled(tables: Mapping[str, Any], at: Callable[[Location], str]) -> Iterator[str]:
    """Names that are almost those of a sweep; other unknown ones are found with the settings."""
    for name in tables:
        near = near_spelling(name, (*OWN_KEYS, *SECTION_NAMES, *TOP_LEVEL))
        if name not in (*OWN_KEYS, *SECTION_NAMES, *TOP_LEVEL) and near_spelling(name, OWN_KEYS) == near != "":
            yield f"{at([name])}: unknown key {name}{near}"


def _base(file: Path, named: object, at: Callable[[Location], str]) -> Written:
    if named is None:
        return Written.nothing()
    if not isinstance(named, str):
        raise ConfigError(f'{at(["config"])}: config = {shown(named)}: expected a file, for example "style.toml"')
    path = Path(named).expanduser()
    path = path if path.is_absolute() else file.parent / path
    return Written.from_toml(path, *read_toml(path))


def _grid_problems(grid: object, at: Callable[[Location], str]) -> Iterator[str]:
    if not isinstance(grid, dict):
        yield f'{at(["grid"])}: grid must be a table [grid] of lines like "lora.rank" = [4, 16]'
        return
    for key, values in flat(grid).items():
        where = f"{at(['grid', *key.split('.')])}: grid {key}"
        if not isinstance(values, list) or not values:
            yield f"{where} = {shown(values)}: {_FORM}"
            continue
        yield from _name_problem(where, key)
        texts = [shown(value) for value in values]
        for text in dict.fromkeys(text for text in texts if texts.count(text) > 1):
            yield f"{where}: {text} is listed twice"


def _entry_problems(entries: object, at: Callable[[Location], str]) -> Iterator[str]:
    if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        yield f'{at(["runs"])}: runs must be tables [[runs]] of lines like "lora.rank" = 16'
        return
    seen: set[str] = set()
    for number, entry in enumerate(entries):
        where, name = f"{at(['runs', number])}: [[runs]]", entry.get("name")
        if name is not None and not (isinstance(name, str) and name.strip()):
            yield f'{where} name = {shown(name)}: expected text, for example "high-rank"'
        elif name is not None and name.casefold() in seen:
            yield f"{where} name = {shown(name)} is used twice"
        elif name is not None:
            seen.add(name.casefold())
        for key in flat({k: v for k, v in entry.items() if k != "name"}):
            yield from _name_problem(f"{at(['runs', number, *key.split('.')])}: [[runs]] {key}", key)


def _name_problem(where: str, key: str) -> Iterator[str]:
    section, dot, _ = key.partition(".")
    if key == "output.path":
        yield f"{where}: each run writes into a folder of its own; leave it out, and name the folder of all with --out"
    elif not dot and key not in TOP_LEVEL:
        yield f"{where}: {_FORM}"
    elif dot and section not in SECTION_NAMES:
        yield f"{where}: there is no section {section}{near_spelling(section, SECTION_NAMES)}"


def _engine_problems(tables: Mapping[str, Any], at: Callable[[Location], str]) -> Iterator[str]:
    for name in ENGINE_TABLES:
        if not isinstance(tables.get(name, {}), dict):
            yield f"{at([name])}: {name} must be a table [{name}]"


def _shared_problems(
    grid: Mapping[str, Any], entries: list[Mapping[str, Any]], at: Callable[[Location], str]
) -> Iterator[str]:
    if not grid and not entries:
        yield f'{at([])}: nothing to try; add [grid] with lines like "lora.rank" = [4, 16], or tables [[runs]]'
    axes = flat(grid)
    for number, entry in enumerate(entries):
        for key in flat({k: v for k, v in entry.items() if k != "name"}):
            if key in axes:
                yield f"{at(['runs', number, *key.split('.')])}: [[runs]] {key} is in [grid] too; keep one of them"
