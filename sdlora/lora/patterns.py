"""Shell-style patterns for canonical names of modules."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import SequenceMatcher, get_close_matches
from fnmatch import translate
from functools import cache

_NEAR = 0.5
"""Least similarity of a part of a name that is suggested in the place of another: "tok" and "to_k" have 0.86."""
_SUGGESTED = 3


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names ``name``, or something that it is in.

    ``*`` is any text, with dots too, ``?`` any character, ``[01]`` one of several; case matters. ``unet.mid_block`` matches
    everything in the block, as ``unet.mid_block.*`` does.
    """
    exact, within = _compiled(pattern)
    return bool(exact.match(name) or within.match(name))


@cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    return re.compile(translate(pattern)), re.compile(translate(f"{pattern}.*"))


def near_misses(pattern: str, names: Collection[str]) -> tuple[str, ...]:
    """Patterns that are like ``pattern`` and match one of ``names``, the most similar first; () where none is.

    One part between dots is replaced; else the whole is compared with the names and what they are in.
    """
    parts = pattern.split(".")
    vocabulary = sorted({part for name in names for part in name.split(".")})
    found: dict[str, float] = {}
    for i, part in enumerate(parts):
        for other in vocabulary:
            likeness = SequenceMatcher(None, part, other).ratio()
            numbers = part.isdigit() and other.isdigit()
            if other == part or not (numbers or likeness >= _NEAR):
                continue
            changed = ".".join([*parts[:i], other, *parts[i + 1 :]])
            if any(matches(changed, name) for name in names):
                found[changed] = max(likeness, found.get(changed, 0))
    if found:
        return tuple(sorted(found, key=lambda each: (-found[each], each))[:_SUGGESTED])
    whole = {".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2)}
    return tuple(get_close_matches(pattern, sorted(whole), _SUGGESTED))
