"""What counts as a number where callers from Python name one: true and false do not."""

from __future__ import annotations

from typing import TypeGuard

from ..errors import SdloraError


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an int."""
    return isinstance(value, int) and not isinstance(value, bool)


def count_problems(**values: object) -> list[str]:
    """A sentence on each of ``values``, by its name, that is no whole number from 1."""
    return [
        f"{name} {value!r}: expected a whole number, at least 1"
        for name, value in values.items()
        if not (is_whole(value) and value >= 1)
    ]


def check_counts(**values: object) -> None:
    """Raises ``SdloraError`` with the ``count_problems`` of ``values``."""
    if problems := count_problems(**values):
        raise SdloraError(problems)
