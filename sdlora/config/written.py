"""What a configuration states, before it is checked, and where it states it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .sections import TOP_LEVEL, Config
from .toml_file import Location, place

COMMAND_LINE = "command line"


@dataclass(frozen=True, kw_only=True)
class Written:
    """Tables of a configuration: of a file, of another trainer's configuration, or none."""

    tables: Mapping[str, Any]
    """As TOML has them."""
    place: Callable[[Location], str]
    """Where a key is stated, for a message: the file and its line; "" where there is no file."""
    folder: Path | None = None
    """Relative paths go by it; None: by the working folder."""

    @classmethod
    def nothing(cls) -> Written:
        """No file at all."""
        return cls(tables={}, place=lambda location: "")

    @classmethod
    def from_toml(cls, file: Path, tables: Mapping[str, Any], text: str) -> Written:
        """The tables of ``file``, which contains ``text``."""
        return cls(tables=tables, place=partial(place, str(file), text), folder=file.parent)


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A configuration that was checked, and where its values are stated."""

    config: Config
    stated: Mapping[str, str]
    """``section.key`` -> where it is stated, in words; without what has its default."""


def places_of(written: Written, overridden: Mapping[str, str]) -> dict[str, str]:
    """``section.key`` -> where it is stated, of everything in ``written`` and ``overridden`` (name -> where)."""
    names = {
        f"{section}.{key}": [section, key]
        for section, table in written.tables.items()
        if isinstance(table, dict)
        for key in table
    }
    names |= {key: [key] for key in written.tables.keys() & set(TOP_LEVEL)}
    return {name: written.place(location) for name, location in names.items()} | dict(overridden)
