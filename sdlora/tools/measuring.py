"""What the tools that measure LoRAs share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


def cosine(both: float, first: float, second: float) -> float:
    """⟨A, B⟩ / (‖A‖ ‖B‖) from ⟨A, B⟩ and both squared norms; NaN where one is zero."""
    return both / math.sqrt(first * second) if first > 0 and second > 0 else math.nan


def grouped(values: Mapping[str, Value], key: Callable[[str], str]) -> dict[str, list[Value]]:
    """The values of all modules with the same ``key`` of their names."""
    groups: dict[str, list[Value]] = {}
    for name, value in values.items():
        groups.setdefault(key(name), []).append(value)
    return groups


def part_of(name: str) -> str:
    """Part of the base that the module with this canonical name belongs to."""
    return name.partition(".")[0]


def without_nan(value: Any) -> Any:
    """``value`` for JSON, which has no NaN: null takes its place."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
