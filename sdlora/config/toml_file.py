"""Reading TOML, and the line of a key in its text."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError

Location = Sequence[str | int]
"""Names of tables and keys from the outside in. A number counts the tables of one name ``[[...]]``, from 0."""


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
        if file.is_dir():
            raise ConfigError(f"{file}: a folder, not a file") from None
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def parse_value(text: str) -> Any:
    """``text`` as a TOML value where it is one; otherwise ``text`` itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def place(source: str, text: str, location: Location) -> str:
    """``source`` with the line of TOML ``text`` that sets ``location``, or the table that it would be in."""
    best_line, best_shared = 0, 0
    for line, path in _paths(text):
        shared = _shared_parts(path, location)
        if shared > best_shared:
            best_line, best_shared = line, shared
    return f"{source}:{best_line}" if best_line else source


def _paths(text: str) -> list[tuple[int, list[str | int]]]:
    """Line number, from 1, and location of each table header and each assignment in ``text``."""
    found: list[tuple[int, list[str | int]]] = []
    table: list[str | int] = []
    counts: dict[tuple[str | int, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[\[?)([^\[\]]+)\]", line):
            table = _header_path(_key_parts(header[2]), header[1] == "[[", counts)
            found.append((number, table))
        elif assignment := re.match(r"([^=#]+?)\s*=", line):
            found.append((number, [*table, *_key_parts(assignment[1])]))
    return found


def _header_path(parts: Sequence[str], is_list: bool, counts: dict[tuple[str | int, ...], int]) -> list[str | int]:
    """The location of a header; ``counts`` has the number of the last table of each name ``[[...]]``."""
    path: list[str | int] = []
    for i, part in enumerate(parts, 1):
        path.append(part)
        if is_list and i == len(parts):
            counts[tuple(path)] = counts.get(tuple(path), -1) + 1
        if tuple(path) in counts:
            path.append(counts[tuple(path)])
    return path


def _shared_parts(path: Location, location: Location) -> int:
    shared = 0
    for part, other in zip(path, location, strict=False):
        if part != other:
            break
        shared += 1
    return shared


def _key_parts(key: str) -> list[str]:
    return [part.strip(" \t\"'") for part in key.split(".")]
