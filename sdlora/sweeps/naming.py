"""Readable names of runs, which are names of folders and files: ``rank=8,seed=1``."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.catalogue import all_settings
from ..config.toml_text import toml_value
from .sweep_file import RunEntry, SweepFile

LONGEST = 120
"""Characters of a name, at most: ``NAME-000500.safetensors`` in a folder ``NAME`` must have room in a path."""
_DIGEST = 6


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One run of a sweep: its name, and the settings that are its own."""

    name: str
    settings: Mapping[str, Any]
    """``section.key`` -> value as TOML has it: of its table ``[[runs]]``, then of the grid."""
    entry: int | None
    """Number of its table ``[[runs]]``, from 0; None where there are none."""


def variants_of(sweep: SweepFile) -> tuple[Variant, ...]:
    """Every table ``[[runs]]`` with every combination of the grid; the last key of the grid changes fastest.

    Names differ, also where letters' case does not count.
    """
    labels = _labels(sweep)
    combinations = [
        dict(zip((axis.key for axis in sweep.grid), values, strict=True))
        for values in itertools.product(*(axis.values for axis in sweep.grid))
    ]
    entries: Sequence[tuple[int | None, RunEntry]]
    entries = [*enumerate(sweep.entries)] or [(None, RunEntry(name=None, settings={}))]
    found, taken = [], set()
    for number, entry in entries:
        for combination in combinations:
            named = combination if entry.name else {**entry.settings, **combination}
            parts = [labels[key, toml_value(value)] for key, value in named.items()]
            name = ",".join([*([_clean(entry.name)] if entry.name else []), *parts]) or "run"
            settings = {**entry.settings, **combination}
            name = _unique(_short(name), settings, taken)
            taken.add(name.casefold())
            found.append(Variant(name=name, settings=settings, entry=number))
    return tuple(found)


def _labels(sweep: SweepFile) -> dict[tuple[str, str], str]:
    """(``section.key``, value as TOML) -> ``key=value`` in a name."""
    values: dict[str, dict[str, Any]] = {}
    for key, value in _stated(sweep):
        values.setdefault(key, {})[toml_value(value)] = value
    last = [key.rpartition(".")[2] for key in values]
    labels = {}
    for key, stated in values.items():
        short = key.rpartition(".")[2]
        for text, label in zip(stated, _value_labels(key, list(stated.values())), strict=True):
            labels[key, text] = f"{short if last.count(short) == 1 else key}={label}"
    return labels


def _stated(sweep: SweepFile) -> Iterator[tuple[str, Any]]:
    for axis in sweep.grid:
        yield from ((axis.key, value) for value in axis.values)
    for entry in sweep.entries:
        yield from entry.settings.items()


def _value_labels(key: str, values: Sequence[Any]) -> list[str]:
    """A label for each of ``values``; paths by as many of their last parts as set them apart."""
    places = {setting.name for setting in all_settings() if setting.affects == "place"}
    if key in places and all(isinstance(value, str) for value in values):
        parts = [[part for part in re.split(r"[\\/]+", os.path.normpath(value)) if part] for value in values]
        for count in range(1, max(map(len, parts)) + 1):
            labels = [_clean("-".join(part[-count:])).removesuffix(".safetensors") for part in parts]
            if len({label.casefold() for label in labels}) == len(labels):
                return labels
    return [_clean(_text(value)) for value in values]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "+".join(map(_text, value))
    return toml_value(value)


def _clean(text: str) -> str:
    """``text`` with a dash for what a name of a file should not have, on any system."""
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-. ") or "-"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - _DIGEST - 1].rstrip(',-. ')}~{_digest(name)}"


def _unique(name: str, settings: Mapping[str, Any], taken: set[str]) -> str:
    """``name``, with a digest of its settings where an earlier run has that name."""
    return name if name.casefold() not in taken else f"{name}~{_digest(toml_value(settings))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
