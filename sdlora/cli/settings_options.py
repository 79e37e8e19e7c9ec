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
    from ..config.written import LoadedConfig

FIRST_PRESET = "style"
"""The preset of a run on mini without a configuration file: someone tries things out, and must see a style."""


def run_config(
    arguments: Sequence[str], options: Mapping[tuple[str, str], object], from_kohya: str | None = None
) -> LoadedConfig:
    """The configuration of a run: a file, if ``arguments`` begin with one, under settings and ``options``.

    Without a file the preset of a run on mini is ``FIRST_PRESET``, and the output of a folder of images is
    ``out/FOLDER.safetensors``. With ``from_kohya`` a configuration of kohya's trainer is in place of the file.

    Raises:
        ConfigError: a file, key or value that is wrong.
        typer.BadParameter: nothing is given, or two configurations.
    """
    given = list(arguments)
    file = given.pop(0) if given and ("=" not in given[0] or Path(given[0]).is_file()) else None
    given = merged(options, given)
    if from_kohya is not None:
        if file is not None:
            raise typer.BadParameter(f"{file}: a second configuration beside --from-kohya; give one of them")
        return _from_kohya(from_kohya, given)
    if file is None and not given:
        raise typer.BadParameter("name a CONFIG.toml, or give --images DIR and --trigger WORD")
    from ..config.loading import load_stated

    if file is not None:
        return load_stated(file, given)
    implied = _implied(given, options.get(("--images", "data.images")))
    settings = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, (value, _) in implied.items())
    return load_stated(None, [*given, *settings], {name: why for name, (_, why) in implied.items()})


def _from_kohya(source: str, given: Sequence[str]) -> LoadedConfig:
    from ..config.kohya_training import read_kohya
    from ..config.loading import load_stated

    kohya = read_kohya(source, {setting.partition("=")[0].strip() for setting in given})
    for line in kohya.left_out:
        typer.echo(line, err=True)
    return load_stated(kohya.written, given)


def _implied(given: Sequence[str], images: object) -> dict[str, tuple[str, str]]:
    """Name of a setting that a command without a file leaves out -> its value, and why it has it."""
    from ..config.presets import MINI

    named = {name.strip(): value.strip() for name, _, value in (setting.partition("=") for setting in given)}
    implied = {}
    if parse_value(named.get("base.path", MINI)) == MINI:
        implied["preset"] = (FIRST_PRESET, "mini, and no configuration file; --preset none is none")
    if images is not None:
        output = f"out/{Path(str(images)).resolve().name}.safetensors"
        implied["output.path"] = (output, "the name of the folder of images")
    return {name: value for name, value in implied.items() if name not in named}


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
