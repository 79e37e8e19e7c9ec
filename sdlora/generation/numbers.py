"""What counts as a number where callers from Python name one: true and false do not."""

from __future__ import annotations


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether ``value`` is an int."""
    return isinstance(value, int) and not isinstance(value, bool)
