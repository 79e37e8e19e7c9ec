"""All settings with what they state about themselves: type, default, documentation, kohya's name, what they affect."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from inspect import cleandoc
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from .data_section import ImageSettings
from .sections import SECTION_NAMES, TOP_LEVEL, Config, Section
from .setting import Affects, setting_of


@dataclass(frozen=True, kw_only=True)
class SettingFacts:
    """One setting, in words."""

    section: str
    key: str
    values: str
    """Which values are possible."""
    required: bool
    default: Any
    """As JSON has it; None also where it is required."""
    affects: Affects
    kohya: str | None
    """Its name in kohya's trainer or in the dataset configuration of it."""
    documentation: str

    @property
    def name(self) -> str:
        """``section.key``; the key alone above all sections."""
        return f"{self.section}.{self.key}" if self.section else self.key

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SectionFacts:
    """One table of the configuration."""

    name: str
    """``data.sets`` for the tables ``[[data.sets]]``."""
    documentation: str
    settings: tuple[SettingFacts, ...]


@cache
def all_sections() -> tuple[SectionFacts, ...]:
    """What is above all sections, then every section in the order of ``Config``, ``data.sets`` after ``data``."""
    above = tuple(_facts("", key, Config.model_fields[key]) for key in TOP_LEVEL)
    first = SectionFacts(name="", documentation="A key at the start of a file.", settings=above)
    return first, *(
        SectionFacts(
            name=name,
            documentation=" ".join(cleandoc(section.__doc__ or "").split()),
            settings=tuple(_facts(name, key, section.model_fields[key]) for key in _own_keys_first(section)),
        )
        for name, section in _sections(Config)
    )


@cache
def all_settings() -> tuple[SettingFacts, ...]:
    """Every setting, in the order of ``all_sections``."""
    return tuple(setting for section in all_sections() for setting in section.settings)


def default_settings() -> dict[str, str]:
    """``section.key`` -> its default as JSON, of every key that has one."""
    return {
        setting.name: json.dumps(setting.default)
        for setting in all_settings()
        if not setting.required and setting.section in SECTION_NAMES
    }


def _sections(parent: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Sections within ``parent``, and those within them."""
    for key, field in parent.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield prefix + key, kind
                yield from _sections(kind, f"{prefix}{key}.")


def _own_keys_first(section: type[Section]) -> list[str]:
    """The keys of ``section``, those that it inherits after its own."""
    return sorted(section.model_fields, key=lambda key: key not in section.__annotations__)


def _facts(section: str, key: str, field: FieldInfo) -> SettingFacts:
    setting = setting_of(field)
    values = setting.values or _values_in_words(field)
    overrides = section == "data.sets" and key in ImageSettings.model_fields
    documentation = f"Overrides ``data.{key}`` for this set." if overrides else field.description or ""
    return SettingFacts(
        section=section,
        key=key,
        values="path" if setting.affects == "place" and values == "text" else values,
        required=field.is_required(),
        default=None if field.is_required() or overrides else json.loads(json.dumps(field.default)),
        affects=setting.affects,
        kohya=setting.kohya,
        documentation=" ".join(documentation.split()),
    )


_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    tuple[str, ...]: "list of texts",
}
_BOUNDS = {
    "ge": "at least {}",
    "gt": "more than {}",
    "le": "at most {}",
    "lt": "less than {}",
    "max_length": "at most {} characters",
}
"""Attribute of a constraint -> what it says."""


def _values_in_words(field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Literal:
        *others, last = map(json.dumps, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    bounds = [
        words.format(getattr(constraint, attribute))
        for constraint in field.metadata
        for attribute, words in _BOUNDS.items()
        if getattr(constraint, attribute, None) is not None
    ]
    return ", ".join((_KINDS[kind], *bounds))
