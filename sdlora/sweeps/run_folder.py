"""The folder of one run: its configuration, its log, what it answered, and its output."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.loading import load_config
from ..config.locations import from_folder
from ..config.presets import MINI
from ..config.sections import SECTION_NAMES, TOP_LEVEL, Config, Section
from ..config.setting import setting_of
from ..config.toml_text import toml_key, toml_value
from ..errors import ConfigError, ResumeError
from ..files import printable, write_whole
from ..formats.run_names import RUN_SUFFIX, step_of_checkpoint
from .jobs import ANSWER_NAME
from .planning import CONFIG_NAME, PlannedRun

_MAY_CHANGE = ("nothing", "text", "samples")
"""What a setting affects that may change between two calls of a sweep, as it may for one run."""


def run_toml(config: Config, folder: Path) -> str:
    """What ``config`` states, as the text of a configuration file in ``folder``; paths go by that folder."""
    lines = [f"{key} = {toml_value(getattr(config, key))}" for key in TOP_LEVEL if key in config.model_fields_set]
    for name in SECTION_NAMES:
        section = getattr(config, name)
        if name in config.model_fields_set and (stated := _stated(section, folder)):
            lines += ["", f"[{name}]", *(f"{toml_key(key)} = {toml_value(value)}" for key, value in stated.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def prepare(run: PlannedRun) -> None:
    """Make the folder of ``run`` and write its configuration.

    Raises:
        OSError: it cannot be written.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(run.folder / CONFIG_NAME, run_toml(run.config, run.folder).encode())


def check_same(runs: Sequence[PlannedRun]) -> None:
    """Whether what an earlier call left in the folders of ``runs`` was made with the same settings.

    Raises:
        ResumeError: with one line for each run that differs.
    """
    problems: list[str] = []
    for run in runs:
        try:
            _check_same(run)
        except ResumeError as error:
            problems += error.problems
    if problems:
        raise ResumeError(problems)


def _check_same(run: PlannedRun) -> None:
    file = run.folder / CONFIG_NAME
    if not file.exists():
        return
    try:
        earlier = _deciding(load_config(file), run.folder)
    except ConfigError as error:
        raise ResumeError(error.problems) from None
    now = _deciding(run.config, run.folder)
    changed = sorted(key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key))
    if changed:
        what = "; ".join(
            f"{key} was {_in_words(earlier.get(key))}, is now {_in_words(now.get(key))}" for key in changed
        )
        raise ResumeError(
            f"{printable(run.folder)}: made with other settings: {what}; undo that, choose another --out, or remove "
            "the folder"
        )


def answer_of(run: PlannedRun) -> Mapping[str, Any] | None:
    """What the process of a complete run printed as JSON; None where none is complete."""
    try:
        answer = json.loads((run.folder / ANSWER_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) and "steps" in answer and run.output.is_file() else None


def steps_kept(run: PlannedRun) -> int:
    """Steps of the newest checkpoint of a half-done run; 0 where it has none."""
    found = run.output.with_suffix(RUN_SUFFIX).glob("*")
    return max((step_of_checkpoint(file.name) or 0 for file in found), default=0)


def _stated(section: Section, folder: Path) -> dict[str, Any]:
    """Key -> value as TOML has it, of what ``section`` states."""
    stated = {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key not in section.model_fields_set or value is None:
            continue
        if isinstance(value, str) and setting_of(field).affects == "place" and (key, value) != ("path", MINI):
            value = from_folder(value, folder)
        stated[key] = _as_toml(value, folder)
    return stated


def _as_toml(value: Any, folder: Path) -> Any:
    if isinstance(value, Section):
        return _stated(value, folder)
    if isinstance(value, tuple | list):
        return [_as_toml(each, folder) for each in value]
    return value


def _deciding(config: Config, folder: Path) -> dict[str, Any]:
    """``section.key`` -> value, of what decides the result; without what has its default."""
    found: dict[str, Any] = {key: getattr(config, key) for key in TOP_LEVEL if key in config.model_fields_set}
    for name in SECTION_NAMES:
        section = getattr(config, name)
        for key, field in type(section).model_fields.items():
            value, facts = getattr(section, key), setting_of(field)
            if facts.affects in _MAY_CHANGE or value == field.get_default(call_default_factory=True):
                continue
            if f"{name}.{key}" not in ("output.path", "cache.folder"):
                found[f"{name}.{key}"] = _comparable(value, facts.affects == "place", folder)
    return found


def _comparable(value: Any, is_place: bool, folder: Path) -> Any:
    if is_place and isinstance(value, str) and value != MINI:
        return os.path.realpath(value)
    return _as_toml(value, Path(os.path.realpath(folder)))


def _in_words(value: Any) -> str:
    return "not set" if value is None else toml_value(value)
