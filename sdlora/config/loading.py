"""A configuration from TOML and ``section.key=value``; every fault of it at once, each with its line."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from ..errors import ConfigError
from .sections import BaseSection, Config, Section


def default_settings() -> dict[str, str]:
    """``section.key`` -> its default as JSON, of every key that has one."""
    found: dict[str, str] = {}
    for section, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys = {key: own for key, own in kind.model_fields.items() if not own.is_required()}
            found |= {f"{section}.{key}": json.dumps(own.default) for key, own in keys.items()}
    return found


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read ``file`` and apply ``section.key=value`` overrides.

    Values of overrides are TOML where they parse as TOML and text otherwise, so quotes are not needed.

    Raises:
        ConfigError: with one line for each unknown key (and the nearest known one), wrong value or missing key.
    """
    tables, text = {}, ""
    if file is not None:
        tables, text = read_toml(Path(file))
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and section and name):
            problems.append(f"{override!r}: expected section.key=value, for example train.steps=300")
            continue
        table = tables.setdefault(section, {})
        if isinstance(table, dict):
            table[name] = _toml_value(value.strip())
    try:
        config = Config.model_validate(_as_tuples(tables))
    except ValidationError as error:
        for entry in error.errors():
            problems += _explain(entry, str(file or "configuration"), text)
        config = None
    if config is None or problems:
        raise ConfigError(problems)
    return config


def base_section(**options: Any) -> BaseSection:
    """The ``[base]`` section from its keys; those that are None take their defaults.

    Raises:
        ConfigError: with one line for each wrong value.
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return BaseSection(**given)
    except ValidationError as error:
        lines = [
            f"base.{entry['loc'][0]} = {entry.get('input')!r}: {_lowered(entry['msg'])}" for entry in error.errors()
        ]
        raise ConfigError(lines) from None


def _lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def read_toml(file: Path) -> tuple[dict[str, Any], str]:
    """The tables of ``file``, and its text.

    Raises:
        ConfigError: missing, unreadable, not UTF-8, or not TOML.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        return tomllib.loads(text), text
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _as_tuples(value: Any) -> Any:
    """TOML's lists as tuples and its whole numbers as they are, for strict validation."""
    if isinstance(value, dict):
        return {key: _as_tuples(entry) for key, entry in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _explain(entry: Any, source: str, text: str) -> Iterator[str]:
    location = list(entry["loc"])
    name = ".".join(part for part in location if isinstance(part, str))
    where = place(source, text, location)
    if entry["type"] == "settings":
        for problem in entry["ctx"]["problems"].split("\n"):
            key = re.match(r"\w+", problem)
            assert key is not None
            yield f"{place(source, text, [*location, key[0]])}: {name}.{problem}"
    elif entry["type"] == "extra_forbidden":
        yield f"{where}: unknown key {name}{nearest(name, _known_keys(Config))}"
    elif entry["type"] == "missing":
        yield f"{where}: {name} is missing"
    else:
        yield f"{where}: {name} = {entry.get('input')!r}: {_lowered(entry['msg'])}"


def nearest(name: str, known: Sequence[str]) -> str:
    """A question for the one of ``known`` that ``name`` might have meant; "" where ``known`` has nothing beside it."""
    siblings = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
    near = difflib.get_close_matches(name, known, 1, 0.6) or difflib.get_close_matches(name, siblings, 1, 0.0)
    return f"; did you mean {near[0]}?" if near else ""


def _known_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for key, field in section.model_fields.items():
        keys.append(prefix + key)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                keys += _known_keys(kind, f"{prefix}{key}.")
    return keys


def place(source: str, text: str, location: Sequence[str | int]) -> str:
    """``source`` and the line of TOML ``text`` that sets ``location``, or that comes nearest to it.

    A number in ``location`` counts the tables of one name ``[[...]]``, from 0.
    """
    line, nearest_yet = 0, 0
    table: list[str | int] = []
    tables: dict[tuple[str | int, ...], int] = {}
    for number, content in enumerate(text.splitlines(), 1):
        path: list[str | int] = []
        if header := re.match(r"\s*(\[\[?)([^\[\]]+)\]", content):
            parts = _key_parts(header[2])
            for i, part in enumerate(parts, 1):
                path.append(part)
                if i == len(parts) and header[1] == "[[":
                    tables[tuple(path)] = tables.get(tuple(path), -1) + 1
                if tuple(path) in tables:
                    path.append(tables[tuple(path)])
            table = path
        elif assignment := re.match(r"([^=#]+?)\s*=", content):
            path = [*table, *_key_parts(assignment[1])]
        shared = next((i for i, pair in enumerate(zip(path, location, strict=False)) if pair[0] != pair[1]), None)
        shared = min(len(path), len(location)) if shared is None else shared
        if shared > nearest_yet:
            line, nearest_yet = number, shared
    return f"{source}:{line}" if line else source


def _key_parts(key: str) -> list[str]:
    return [part.strip(" \t\"'") for part in key.split(".")]
