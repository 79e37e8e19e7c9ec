"""Validation errors in plain English: what a value must be."""

from __future__ import annotations

from typing import Any

_EXPECTED = {
    "int_type": "must be a whole number, for example {example}",
    "int_from_float": "must be a whole number, for example {example}",
    "float_type": "must be a number, for example 0.5",
    "bool_type": "must be true or false",
    "string_type": "must be text in quotes",
    "tuple_type": 'must be a list, for example ["a", "b"]',
    "model_type": "must be a table",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
}
"""Type of an error of pydantic -> what to say instead; values in braces come from the error."""


def expectation(error: Any, example: object = None) -> str:
    """What the value at fault must be, to follow "section.key = value: ".

    Args:
        error: an entry of ``ValidationError.errors()``.
        example: a possible value, for whole numbers; a whole number written as 300.0 is its own.
    """
    expected = _EXPECTED.get(error["type"])
    if expected is None:
        message: str = error["msg"]
        return message[0].lower() + message[1:]
    given = error.get("input")
    if isinstance(given, float) and given.is_integer():
        example = int(given)
    shown = example if type(example) is int else 300
    bounds = {key: f"{value:g}" if isinstance(value, float) else value for key, value in error.get("ctx", {}).items()}
    return expected.format(**{"example": shown, **bounds})
