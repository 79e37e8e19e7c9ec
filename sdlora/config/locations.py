"""Where the paths of a configuration lead: ``~``, and relative paths in a file."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from .sections import SECTION_NAMES, DatasetConfig, Section
from .setting import setting_of

C = TypeVar("C", bound=DatasetConfig)
S = TypeVar("S", bound=Section)


def located(config: C, folder: Path | None, elsewhere: Collection[str] = ()) -> C:
    """``config`` with paths that lead there from the working folder.

    Args:
        folder: that of the file; relative paths in it go by it. None where there is no file.
        elsewhere: ``section.key`` of what the file does not state; these go by the working folder.
    """
    changed = {}
    for name in config.model_fields_set & set(SECTION_NAMES):
        section = getattr(config, name)
        if section is not None:
            changed[name] = _located_section(section, name, folder, elsewhere)
    return config.model_copy(update=changed)


def from_folder(path: str, folder: Path) -> str:
    """``path``, which goes by the working folder, as a file in ``folder`` states it; whole where it is on another drive."""
    try:
        short = os.path.relpath(path, folder)
        if os.path.realpath(os.path.join(folder, short)) != os.path.realpath(path):
            # Upwards, a system follows the folders that links lead to.
            short = os.path.relpath(os.path.abspath(path), os.path.realpath(folder))
        return Path(short).as_posix()
    except ValueError:
        return Path(os.path.abspath(path)).as_posix()


def _located_section(section: S, name: str, folder: Path | None, elsewhere: Collection[str]) -> S:
    changed: dict[str, Any] = {}
    for key in section.model_fields_set:
        value, base = getattr(section, key), None if f"{name}.{key}" in elsewhere else folder
        if key == "sets":
            changed[key] = tuple(_located_section(each, "data.sets", base, ()) for each in value)
        elif isinstance(value, str) and setting_of(type(section).model_fields[key]).affects == "place":
            changed[key] = value if (name, key, value) == ("base", "path", "mini") else _path(value, base)
    return section.model_copy(update=changed)


def _path(value: str, folder: Path | None) -> str:
    path = os.path.expanduser(value)
    if folder is None or os.path.isabs(path) or folder == Path():
        return path
    joined = os.path.join(folder, path)
    short = os.path.normpath(joined)
    # They differ where a part of the path is a link to another folder.
    return short if os.path.realpath(short) == os.path.realpath(joined) else joined
