"""The axes of a grid: ``KIND:VALUE,VALUE``. A new kind is a new row of ``KINDS``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SdloraError
from .changes import (
    Change,
    add_lora,
    replace_text,
    set_field,
    set_sampler,
    set_schedule,
    set_seed,
    set_size,
    set_strength,
    take_step,
    weigh,
)
from .values import numbers, split_values

AxisArgument = str | tuple[str, Sequence[object]]
"""``KIND:VALUE,VALUE``, or the kind and its values."""
DIRECTIONS = ("x", "y", "z")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A direction of a grid."""

    direction: str
    """``x``, ``y`` or ``z``."""
    kind: str
    target: str | None
    """Name of the LoRA that it changes; None where it is all of them, or no matter of LoRAs."""
    labels: tuple[str, ...]
    changes: tuple[Change, ...]
    """One for each label."""
    search: str | None = None
    """What an axis ``prompt`` replaces."""

    @property
    def rank(self) -> int:
        """Where several axes change an image, the one with the lowest rank does so first."""
        return list(KINDS).index(self.kind)


Labelled = list[tuple[str, Change]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of axis."""

    shows: str
    """For the help: what its values are."""
    read: Callable[[str | None, list[str]], Labelled]
    """Target and values as text -> label and change of each. Raises ``ValueError`` where a value is none of its."""
    targets: bool = False
    """Whether ``KIND@NAME`` is one LoRA's."""


def _weights(target: str | None, values: list[str]) -> Labelled:
    return [(f"{target or 'weight'} {value:g}", weigh(target, value)) for value in numbers(values, whole=False)]


def _texts(_: str | None, values: list[str]) -> Labelled:
    return [(value, replace_text(values[0], value)) for value in values]


def _steps_of_run(target: str | None, values: list[str]) -> Labelled:
    return [(value if value == "last" else f"step {value}", take_step(target, value)) for value in values]


def _whole(field: str, label: str) -> Callable[[str | None, list[str]], Labelled]:
    return lambda _, values: [
        (label.format(int(value)), set_field(field, int(value))) for value in numbers(values, whole=True)
    ]


KINDS: Mapping[str, Kind] = {
    "lora": Kind(shows="FILE[:UNET[:TE]], or none", read=lambda _, values: [add_lora(value) for value in values]),
    "weight": Kind(shows="weights of all LoRAs; weight@NAME of one", read=_weights, targets=True),
    "step": Kind(shows="steps of a run that wrote NAME-000500.safetensors, or last", read=_steps_of_run, targets=True),
    "prompt": Kind(shows="texts; the first is replaced by each", read=_texts),
    "seed": Kind(
        shows="seeds",
        read=lambda _, values: [(f"seed {value:.0f}", set_seed(value)) for value in numbers(values, whole=True)],
    ),
    "cfg": Kind(
        shows="guidance scales",
        read=lambda _, values: [(f"cfg {value:g}", set_field("cfg", value)) for value in numbers(values, whole=False)],
    ),
    "steps": Kind(shows="numbers of sampling steps", read=_whole("steps", "{} steps")),
    "strength": Kind(
        shows="how much of the image that is drawn over is repainted, above 0 to 1",
        read=lambda _, values: [(f"strength {value:g}", set_strength(value)) for value in numbers(values, whole=False)],
    ),
    "sampler": Kind(shows="samplers", read=lambda _, values: [(value, set_sampler(value)) for value in values]),
    "schedule": Kind(shows="schedules, or auto", read=lambda _, values: [(v, set_schedule(v)) for v in values]),
    "size": Kind(shows="512 or 512x768", read=lambda _, values: [(value, set_size(value)) for value in values]),
}
"""Name -> kind, in the order in which they change an image: a file is chosen before it is weighed."""


def read_axes(given: Mapping[str, AxisArgument | None]) -> list[Axis]:
    """The axes of ``given``, direction -> axis; None where there is none.

    Raises:
        SdloraError: with one line for each axis that cannot be read or occurs twice.
    """
    axes, problems = [], []
    for direction, argument in given.items():
        if argument is None:
            continue
        try:
            axes.append(_read(direction, argument))
        except ValueError as error:
            problems.append(f"{direction}: {error}")
    seen: dict[tuple[str, str | None], str] = {}
    for axis in axes:
        earlier = seen.setdefault((axis.kind, axis.target), axis.direction)
        if earlier != axis.direction:
            name = f"{axis.kind}@{axis.target}" if axis.target else axis.kind
            problems.append(f"{axis.direction}: {name} is the axis {earlier} already")
    if not axes and not problems:
        problems.append("a grid needs an axis; for example x, weight:0,0.5,1")
    if problems:
        raise SdloraError(problems)
    return axes


def _read(direction: str, argument: AxisArgument) -> Axis:
    name, values = _parted(argument)
    kind, at, target = name.partition("@")
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no axis; expected one of {', '.join(KINDS)}")
    if at and not (KINDS[kind].targets and target):
        raise ValueError(f"{name!r} names no LoRA; expected weight@NAME or step@NAME")
    if not values:
        raise ValueError(f"{name} has no values; expected {KINDS[kind].shows}, with commas between them")
    try:
        read = KINDS[kind].read(target or None, values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Axis(
        direction=direction,
        kind=kind,
        target=target or None,
        labels=tuple(label for label, _ in read),
        changes=tuple(change for _, change in read),
        search=values[0] if kind == "prompt" else None,
    )


def _parted(argument: AxisArgument) -> tuple[str, list[str]]:
    """The name and the values of an axis."""
    if isinstance(argument, str):
        match = re.match(r"\s*([^:=]*?)\s*[:=]", argument)
        if match is None:
            raise ValueError(f"{argument!r} is not an axis; expected KIND:VALUE,VALUE, for example weight:0,0.5,1")
        return match[1], split_values(argument[match.end() :])
    if not isinstance(argument, tuple | list) or len(argument) != 2 or isinstance(argument[1], str):
        raise ValueError(
            f"{argument!r} is not an axis; expected 'weight:0,0.5,1', or the kind and a list of its values"
        )
    name, values = argument
    return name, [_as_text(value) for value in values]


def _as_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple) and len(value) == 2:
        return f"{value[0]}x{value[1]}"
    return value.as_posix() if isinstance(value, Path) else str(value)
