"""What holds between the settings of an optimizer: its names, its own defaults, and what cannot go together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

OWN_NAMES = ("adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule-free")
"""Optimizers with a name here. All others have that of the package pytorch-optimizer."""
ADAMW = ("adamw", "adamw8bit")
"""Those that ``weight_decay``, ``betas`` and ``epsilon`` are settings of."""
OTHER_SPELLINGS = {
    "schedulefree": "schedule-free",
    "schedule_free": "schedule-free",
    "schedulefreeadamw": "schedule-free",
    "adamwschedulefree": "schedule-free",
    "radamschedulefree": "schedulefreeradam",
    "sgdschedulefree": "schedulefreesgd",
    "dadaptation": "dadaptadam",
    "dadaptadampreprint": "dadaptadam",
    "dadaptadanip": "dadaptadan",
    "use_8bit_adam": "adamw8bit",
}
"""Names in kohya's trainer and elsewhere, in small letters -> names here."""
LEAST_FACTOR = 0.1
"""A rate below it for an optimizer that finds its rate itself was meant for another optimizer."""


class Arguments(dict[str, Any]):
    """Keyword arguments of an optimizer. They are not changed, so they have a hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """What AdamW computes with, beside the learning rate."""

    weight_decay: float
    betas: tuple[float, float]
    epsilon: float


def canonical_name(value: Any) -> Any:
    """An optimizer's name as it is here, in small letters."""
    if not isinstance(value, str):
        return value
    name = value.strip().lower()
    return OTHER_SPELLINGS.get(name, name)


def as_arguments(value: Any) -> Any:
    """A table of simple values as ``Arguments``."""
    simple = (bool, int, float, str, tuple)
    if not isinstance(value, dict) or not all(isinstance(each, simple) for each in value.values()):
        raise PydanticCustomError(
            "arguments", "must be a table of arguments with their values, for example { d_coef = 2.0 }"
        )
    return Arguments(value)


def are_betas(value: Any) -> bool:
    """Whether ``value`` is two decay rates."""
    numbers = value if isinstance(value, tuple) else ()
    return len(numbers) == 2 and all(type(each) is float and 0 < each < 1 for each in numbers)


def finds_its_rate(name: str) -> bool:
    """Whether learning rates are factors on one that the optimizer finds."""
    return name == "prodigy" or name.startswith("dadapt")


def needs_no_schedule(name: str) -> bool:
    """Whether the optimizer averages its steps in place of a falling learning rate."""
    return name == "schedule-free" or name.startswith("schedulefree")


def own_defaults(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of settings that depend on the optimizer which ``stated`` names."""
    name = canonical_name(stated.get("name", ""))
    if not isinstance(name, str):
        return {}
    if finds_its_rate(name):
        return {"learning_rate": 1.0}
    return {"schedule": "constant"} if needs_no_schedule(name) else {}


def adamw_settings(
    arguments: Arguments, weight_decay: float, betas: tuple[float, float], epsilon: float
) -> AdamWSettings:
    """What AdamW computes with: ``arguments`` where they state it."""
    return AdamWSettings(
        weight_decay=arguments.get("weight_decay", weight_decay),
        betas=arguments.get("betas", betas),
        epsilon=arguments.get("eps", epsilon),
    )


SETTING_OF_ARGUMENT = {
    "lr": "learning_rate",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "betas": "betas",
    "eps": "epsilon",
}
"""Argument -> the setting that states the same."""


def problems_of(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """What cannot go together, each starting with the name of a setting; known without the optimizer's package."""
    name, arguments = settings["name"], settings["arguments"]
    problems = _rate_problems(name, settings)
    if needs_no_schedule(name) and settings["schedule"] != "constant":
        problems.append(
            f'schedule = "{settings["schedule"]}": {name} takes the place of a schedule; leave optimizer.schedule out'
        )
    if needs_no_schedule(name) and settings["ema"]:
        problems.append(f"ema = {settings['ema']}: {name} keeps an average itself; leave optimizer.ema out")
    for key in ("lr", "warmup_steps"):
        if key in arguments:
            problems.append(f"arguments.{key}: state it as optimizer.{SETTING_OF_ARGUMENT[key]}")
    for key in ("weight_decay", "betas", "epsilon"):
        argument = next(other for other, setting in SETTING_OF_ARGUMENT.items() if setting == key)
        if settings[key] == defaults[key]:
            continue
        if name not in ADAMW:
            problems.append(
                f"{key} = {settings[key]}: is for {' and '.join(ADAMW)}; for {name} give it in optimizer.arguments"
            )
        elif argument in arguments:
            problems.append(f"arguments.{argument}: optimizer.{key} is stated too; leave one of them out")
    if name == "adafactor":
        problems += [
            f"arguments.{key} = true: the learning rates come from optimizer.learning_rate and its schedule; leave it out"
            for key in ("relative_step", "warmup_init")
            if arguments.get(key)
        ]
    return problems + (_adamw_problems(arguments) if name == "adamw" else [])


def _rate_problems(name: str, settings: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in ("learning_rate", "text_encoder_learning_rate"):
        rate = settings[key] or 0
        if finds_its_rate(name) and 0 < rate < LEAST_FACTOR:
            problems.append(
                f"{key} = {rate}: {name} finds the learning rate itself, and this is a factor on it; set it to 1.0, or "
                "leave it out"
            )
        elif rate == 1 and name in OWN_NAMES and not finds_its_rate(name):
            problems.append(f"{key} = {rate}: must be less than 1; only optimizers such as prodigy take 1.0")
    return problems


def _adamw_problems(arguments: Arguments) -> list[str]:
    wanted = {
        "weight_decay": ("a number, at least 0", lambda value: type(value) in (int, float) and value >= 0),
        "betas": ("two numbers between 0 and 1, for example [0.9, 0.999]", are_betas),
        "eps": ("a number, more than 0, less than 1", lambda value: type(value) is float and 0 < value < 1),
    }
    problems = []
    for key, value in arguments.items():
        if key in wanted and not wanted[key][1](value):
            problems.append(f"arguments.{key} = {value!r}: must be {wanted[key][0]}")
        elif key not in wanted and key not in SETTING_OF_ARGUMENT:
            problems.append(f"arguments.{key}: adamw has no such argument; it takes {', '.join(wanted)}")
    return problems
