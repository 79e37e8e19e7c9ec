"""A configuration from TOML and ``section.key=value``; all faults at once, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import ConfigError
from .catalogue import all_settings
from .messages import expectation
from .sections import BaseSection, Config, DataSection, DatasetConfig
from .toml_file import parse_value, place, read_toml
from .unknown_keys import answer_by_name, answer_unknown, near_spelling

C = TypeVar("C", bound=DatasetConfig)


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a training run: ``file``, with ``section.key=value`` overrides.

    Values of overrides are TOML where they parse as TOML and text otherwise, so quotes are not needed.

    Raises:
        ConfigError: with one line for each unknown key (and what to use instead), wrong value or missing key.
    """
    return _load(Config, file, overrides)


def load_dataset(file: str | Path | None = None, overrides: Iterable[str] = ()) -> tuple[DataSection, BaseSection]:
    """The dataset and the base of a configuration, which needs neither a trigger word nor an output.

    Raises:
        ConfigError: as ``load_config``.
    """
    config = _load(DatasetConfig, file, overrides)
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


def _load(kind: type[C], file: str | Path | None, overrides: Iterable[str]) -> C:
    tables, text = ({}, "") if file is None else read_toml(Path(file))
    problems = [problem for override in overrides if (problem := _apply(override, tables))]
    try:
        config = kind.model_validate(_with_tuples(tables))
    except ValidationError as error:
        raise ConfigError([*problems, *_explain_all(error, kind, tables, str(file or "configuration"), text)]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _apply(override: str, tables: dict[str, Any]) -> str | None:
    """Put ``section.key=value`` into ``tables``; what is wrong where it is not of this form."""
    name, equals, value = override.partition("=")
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
    error: ValidationError, kind: type[DatasetConfig], tables: Mapping[str, Any], source: str, text: str
) -> Iterator[str]:
    """A line for each fault."""
    for entry in error.errors():
        yield from _explain(entry, source, text)
    # The model itself asks for a trigger only after all other faults are fixed.
    data = tables.get("data")
    if kind is Config and isinstance(data, dict) and "trigger" not in data and error.errors()[0]["loc"]:
        yield f"{place(source, text, ['data', 'trigger'])}: data.trigger is missing"


def _explain(entry: Any, source: str, text: str) -> Iterator[str]:
    location = list(entry["loc"])
    name = ".".join(part for part in location if isinstance(part, str))
    where = place(source, text, location)
    if entry["type"] == "settings":
        for problem in entry["ctx"]["problems"].split("\n"):
            key = re.match(r"[\w.]+", problem)
            assert key is not None
            yield f"{place(source, text, [*location, *key[0].split('.')])}: {'.'.join(filter(None, (name, problem)))}"
    elif entry["type"] == "extra_forbidden":
        yield f"{where}: unknown key {name}{answer_unknown(name)}"
        if len(location) == 1 and isinstance(entry["input"], dict):
            yield from _explain_unknown_table(name, entry["input"], source, text)
    elif entry["type"] == "missing":
        yield f"{where}: {name} is missing"
    else:
        default = next((setting.default for setting in all_settings() if setting.name == name), None)
        yield f"{where}: {name} = {entry['input']!r}: {expectation(entry, default)}"


def _explain_unknown_table(section: str, table: Mapping[str, Any], source: str, text: str) -> Iterator[str]:
    """A line for each key in an unknown table whose place is known; none where only the table is misspelled."""
    for key in table if not near_spelling(section, Config.model_fields) else ():
        if answer := answer_by_name(key):
            yield f"{place(source, text, [section, key])}: unknown key {section}.{key}: {answer}"
