"""Options that are settings: each is ``section.key=value`` under a shorter name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..config.toml_file import parse_value
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config.sections import Config


def run_config(arguments: Sequence[str], options: Mapping[tuple[str, str], object]) -> Config:
    """The configuration of a run: a file, if ``arguments`` begin with one, under settings and ``options``.

    Without an output, that of a folder of images is ``out/FOLDER.safetensors``.

    Raises:
        ConfigError: a file, key or value that is wrong.
        typer.BadParameter: nothing is given.
    """
    given = list(arguments)
    file = given.pop(0) if given and ("=" not in given[0] or Path(given[0]).is_file()) else None
    given = merged(options, given)
    images = options.get(("--images", "data.images"))
    if file is None and images is not None and not any(each.startswith("output.path=") for each in given):
        given.append(f"output.path={json.dumps(f'out/{Path(str(images)).resolve().name}.safetensors')}")
    if file is None and not given:
        raise typer.BadParameter("name a CONFIG.toml, or give --images DIR and --trigger WORD")
    from ..config.loading import load_config

    return load_config(file, given)


def merged(options: Mapping[tuple[str, str], object], settings: Sequence[str]) -> list[str]:
    """``settings`` with those ``options`` that are given.

    Args:
        options: (name of the option, ``section.key``) -> its value; None where it is not given.
        settings: ``section.key=value``, as they were typed.

    Raises:
        ConfigError: an option and a setting state different values of one key.
    """
    typed = {key.strip(): value.strip() for key, _, value in (setting.partition("=") for setting in settings)}
    problems, all_settings = [], list(settings)
    for (option, key), value in options.items():
        if value is None:
            continue
        if key in typed and typed[key] != value and parse_value(typed[key]) != value:
            problems.append(f"{option} {value} and {key}={typed[key]} contradict each other; keep one of them")
        # As TOML text, whatever it looks like: a trigger word of digits stays a word.
        all_settings.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    if problems:
        raise ConfigError(problems)
    return all_settings
