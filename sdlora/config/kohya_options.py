"""What a configuration of kohya's trainer states: a TOML or JSON file, or a command line, pasted or in a file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .kohya_gui import saved_options
from .toml_file import place, read_toml

SCRIPTS = ("train_network.py", "sdxl_train_network.py")
"""The scripts of kohya's trainer that train a LoRA for Stable Diffusion."""


@dataclass(frozen=True, kw_only=True)
class KohyaOption:
    """One option as it is stated."""

    name: str
    value: Any
    """A text where it comes from a command line; True for an option without a value."""
    place: str


def read_options(source: str) -> dict[str, KohyaOption]:
    """Name -> option, of a file, or of a command line.

    Options that are empty, false or none are left out: in kohya's trainer these are not stated.

    Raises:
        ConfigError: ``source`` cannot be read, or it starts another script.
    """
    path = Path(source).expanduser()
    if _is_file(path):
        stated = _file_options(path)
    elif re.search(r"(^|\s)--\w", source) or ".py" in source:
        stated = list(_command_options(source, "command line"))
    else:
        raise ConfigError(f"{source}: no such file, and not a command line with --options")
    return {option.name: option for option in stated if not _is_empty(option.value)}


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A command line is too long for a name.
        return False


def _file_options(path: Path) -> list[KohyaOption]:
    if path.suffix.lower() == ".json":
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object of settings")
        return [_option(name, value, str(path)) for name, value in saved_options(values, str(path)).items()]
    if path.suffix.lower() != ".toml":
        try:
            return list(_command_options(path.read_text(encoding="utf-8-sig"), str(path)))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    tables, text = read_toml(path)
    found = []
    for name, value in tables.items():
        # As kohya's trainer does: tables only group the options.
        inner = value if isinstance(value, dict) else {name: value}
        outer = [name] if isinstance(value, dict) else []
        found += [_option(key, each, place(str(path), text, [*outer, key])) for key, each in inner.items()]
    lengths = {"max_train_steps", "max_train_epochs"} & {option.name for option in found}
    # kohya_ss writes these too into the file that it starts the trainer with; they are no options of it.
    unread = {"noise_offset_type", "epoch"} if lengths else {"noise_offset_type"}
    return [option for option in found if option.name not in unread]


def _option(name: str, value: Any, where: str) -> KohyaOption:
    return KohyaOption(name=name, value=value, place=where)


def _command_options(text: str, where: str) -> Iterator[KohyaOption]:
    """Options after the script; those of a launcher before it are not kohya's."""
    joined = re.sub(r"[\\^`][ \t]*\r?\n", " ", text)
    try:
        words = shlex.split(joined, comments=True, posix="\\" not in joined)
    except ValueError as error:
        raise ConfigError(f"{where}: not a command line ({error})") from None
    words = [word.strip("\"'") for word in words]
    scripts = [number for number, word in enumerate(words) if word.endswith(".py")]
    if scripts:
        script = re.split(r"[\\/]", words[scripts[0]])[-1]
        if script not in SCRIPTS:
            raise ConfigError(f"{where}: {script} is another script; only {' and '.join(SCRIPTS)} can be followed")
        words = words[scripts[0] + 1 :]
    names = [number for number, word in enumerate(words) if re.match(r"--[A-Za-z]", word)]
    for number, end in zip(names, [*names[1:], len(words)], strict=True):
        name, equals, value = words[number].removeprefix("--").partition("=")
        values = [value.strip("\"'")] if equals else []
        values += words[number + 1 : end]
        at = f"{where}: --{name}"
        if name == "config_file":
            yield from _file_options(Path(values[0] if values else ""))
        elif name in ("network_args", "optimizer_args", "lr_scheduler_args"):
            yield _option(name, values, at)
        else:
            yield _option(name, True if not values else values[0] if len(values) == 1 else values, at)
