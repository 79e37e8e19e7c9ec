"""What counts as a number where callers from Python name one: true and false do not."""

from __future__ import annotations

from ..errors import SdloraError


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether ``value`` is an int."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_scale(scale: object) -> None:
    """Raises ``SdloraError`` where ``scale`` is not how many times an image can be enlarged without smoothing."""
    if not isinstance(scale, int) or isinstance(scale, bool) or scale < 1:
        raise SdloraError(f"scale {scale!r}: expected a whole number, at least 1")
