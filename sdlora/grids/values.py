"""The values of an axis, as text: commas between them, quotes around one that holds commas, and A1111's ranges."""

from __future__ import annotations

import csv
import math
import re

_MOST = 1000
"""Values that a range may have."""
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})(?:\s*\(([+-]\d+(?:\.\d+)?)\)|\s*\[(\d+)\])?")
"""``1-5``, ``1-5 (+2)`` in steps of 2, ``1-5 [3]`` as three values."""


def split_values(text: str) -> list[str]:
    """The values between the commas of ``text``, without spaces around them; empty ones are left out."""
    (row,) = csv.reader([text.replace("\n", " ")], skipinitialspace=True)
    return [value.strip() for value in row if value.strip()]


def numbers(values: list[str], *, whole: bool) -> list[float]:
    """The numbers that ``values`` state, with ranges written out.

    Raises:
        ValueError: a value is no number, or a range is endless or has over a thousand values; the text says which.
    """
    found: list[float] = []
    for value in values:
        match = _RANGE.fullmatch(value)
        found += [_number(value, whole=whole)] if match is None else _written_out(match, whole=whole)
    return found


def _number(text: str, *, whole: bool) -> float:
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a {'whole ' if whole else ''}number")
    return number


def _written_out(match: re.Match[str], *, whole: bool) -> list[float]:
    first, last = (_number(match[group], whole=whole) for group in (1, 2))
    if match[4] is not None:
        count = int(match[4])
        if not 1 <= count <= _MOST:
            raise ValueError(f"{match[0]!r}: expected 1 to {_MOST} values in brackets")
        between = [first + (last - first) * number / max(1, count - 1) for number in range(count)]
        return [round(value) if whole else round(value, 6) for value in between]
    step = _number(match[3], whole=whole) if match[3] else math.copysign(1, last - first)
    if not step or (last - first) / step < 0:
        raise ValueError(f"{match[0]!r} never ends: its step leads away from {match[2]}")
    count = math.floor((last - first) / step + 1e-9) + 1
    if count > _MOST:
        raise ValueError(f"{match[0]!r} has {count:,} values; at most {_MOST} are allowed")
    between = [first + step * number for number in range(count)]
    return [int(value) if whole else round(value, 6) for value in between]
