"""Options that are settings: each is ``section.key=value`` under a shorter name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..config.toml_file import parse_value
from ..errors import ConfigError


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
