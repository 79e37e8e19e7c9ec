"""A configuration from TOML and ``section.key=value``; all faults at once, each with its line."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import ConfigError
from .catalogue import all_settings
from .kohya_dataset import is_kohya_dataset
from .locations import located
from .messages import expectation
from .sections import MISSING_TRIGGER, SECTION_NAMES, TOP_LEVEL, BaseSection, Config, DataSection, DatasetConfig
from .toml_file import Location, parse_value, read_toml
from .unknown_keys import answer_by_name, answer_unknown, near_spelling
from .written import COMMAND_LINE, LoadedConfig, Written, places_of

C = TypeVar("C", bound=DatasetConfig)
Place = Callable[[Location], str]
"""Where a key is stated."""


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a training run: ``file``, with ``section.key=value`` overrides.

    Values of overrides are TOML where they parse as TOML and text otherwise, so quotes are not needed. Relative paths in
    ``file`` go by its folder, those in overrides by the working folder; ``~`` is the user's home.

    Raises:
        ConfigError: with one line for each unknown key (and what to use instead), wrong value or missing key.
    """
    return _load(Config, _written(file), overrides)


def load_stated(
    written: str | Path | Written | None, overrides: Iterable[str] = (), implied: Mapping[str, str] | None = None
) -> LoadedConfig:
    """As ``load_config``, with where each value is stated.

    Args:
        written: a file, or what another trainer's configuration says.
        implied: name of an override that nobody typed -> why it has its value.
    """
    if not isinstance(written, Written):
        written = _written(written)
    overrides = tuple(overrides)
    typed = dict.fromkeys((override.partition("=")[0].strip() for override in overrides), COMMAND_LINE)
    return LoadedConfig(
        config=_load(Config, written, overrides), stated=places_of(written, typed | dict(implied or {}))
    )


def as_config(config: Config | str | Path, function: str) -> Config:
    """``config``, or the configuration in the TOML file that it names; ``function`` is the public one that it was given to.

    Raises:
        ConfigError: it is neither, or the file is at fault.
    """
    if isinstance(config, (str, Path)):
        return load_config(config)
    if not isinstance(config, Config):
        expected = "a configuration (sdlora.load_config) or the path of its TOML file"
        raise ConfigError(f"{function}: expected {expected}, not {type(config).__name__}")
    return config


def load_dataset(file: str | Path | None = None, overrides: Iterable[str] = ()) -> tuple[DataSection, BaseSection]:
    """The dataset and the base of a configuration, which needs neither a trigger word nor an output.

    Raises:
        ConfigError: as ``load_config``.
    """
    config = _load(DatasetConfig, _written(file), overrides)
    return config.data, config.base


def base_section(**options: Any) -> BaseSection:
    """The ``[base]`` section from its keys; those that are None take their defaults.

    Raises:
        ConfigError: with one line for each wrong value.
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return BaseSection(**given)
    except ValidationError as error:
        lines = [f"base.{entry['loc'][0]} = {entry['input']!r}: {expectation(entry)}" for entry in error.errors()]
        raise ConfigError(lines) from None


def _written(file: str | Path | None) -> Written:
    if file is None:
        return Written.nothing()
    path = Path(file).expanduser()
    return Written.from_toml(path, *_read(path))


def _load(kind: type[C], written: Written, overrides: Iterable[str]) -> C:
    tables = copy.deepcopy(dict(written.tables))
    overrides = tuple(overrides)
    problems = [problem for override in overrides if (problem := _apply(override, tables))]
    try:
        config = kind.model_validate(_with_tuples(tables))
    except ValidationError as error:
        raise ConfigError([*problems, *_explain_all(error, kind, tables, written.place)]) from None
    if problems:
        raise ConfigError(problems)
    elsewhere = {override.partition("=")[0].strip() for override in overrides}
    return located(config, written.folder, elsewhere)


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """As ``read_toml``, with an answer for what is named in place of a configuration file."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; use --images {file}")
    if is_kohya_dataset(file):
        raise ConfigError(f"{file} is a kohya dataset file: data.dataset_config={file}")
    return read_toml(file)


def _apply(override: str, tables: dict[str, Any]) -> str | None:
    """Put ``section.key=value`` into ``tables``; what is wrong where it is not of this form."""
    name, equals, value = override.partition("=")
    if equals and name.strip() in TOP_LEVEL:
        tables[name.strip()] = parse_value(value.strip())
        return None
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        answer = answer_by_name(name.strip()) if equals else ""
        return f"{override!r}: {answer or 'expected section.key=value, for example train.steps=300'}"
    table = tables.setdefault(section, {})
    if isinstance(table, dict):
        table[key] = parse_value(value.strip())
    return None


def _with_tuples(value: Any) -> Any:
    """TOML's lists as tuples, for strict validation."""
    if isinstance(value, dict):
        return {key: _with_tuples(entry) for key, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _explain_all(
    error: ValidationError, kind: type[DatasetConfig], tables: Mapping[str, Any], place: Place
) -> Iterator[str]:
    """A line for each fault."""
    for entry in error.errors():
        yield from _explain(entry, place)
    # The model itself asks for a trigger only after all other faults are fixed.
    data = tables.get("data")
    if kind is Config and isinstance(data, dict) and "trigger" not in data and error.errors()[0]["loc"]:
        yield _at(place(["data", "trigger"]), MISSING_TRIGGER)


_REMEDIES = {
    "data": "; name the folder of images: --images DIR",
    "output": "; name the file to write: --out FILE.safetensors",
    "output.path": "; name the file to write: --out FILE.safetensors",
}
"""What is missing -> what to do."""


def _at(where: str, problem: str) -> str:
    """``problem`` after its place; alone where there is no file."""
    return f"{where}: {problem}" if where else problem


def _explain(entry: Any, place: Place) -> Iterator[str]:
    location = list(entry["loc"])
    name = ".".join(part for part in location if isinstance(part, str))
    where = place(location)
    if entry["type"] == "settings":
        for problem in entry["ctx"]["problems"].split("\n"):
            key = re.match(r"[\w.]+", problem)
            assert key is not None
            at = place([*location, *key[0].split(".")])
            yield _at(at, ".".join(filter(None, (name, problem))))
    elif entry["type"] == "extra_forbidden":
        yield _at(where, f"unknown key {name}{answer_unknown(name)}")
        if len(location) == 1 and isinstance(entry["input"], dict):
            yield from _explain_unknown_table(name, entry["input"], place)
    elif entry["type"] == "missing":
        yield _at(where, f"{name} is missing{_REMEDIES.get(name, '')}")
    else:
        default = next((setting.default for setting in all_settings() if setting.name == name), None)
        yield _at(where, f"{name} = {entry['input']!r}: {expectation(entry, default)}")


def _explain_unknown_table(section: str, table: Mapping[str, Any], place: Place) -> Iterator[str]:
    """A line for each key in an unknown table whose place is known; none where only the table is misspelled."""
    for key in table if not near_spelling(section, SECTION_NAMES) else ():
        if answer := answer_by_name(key):
            yield _at(place([section, key]), f"unknown key {section}.{key}: {answer}")
