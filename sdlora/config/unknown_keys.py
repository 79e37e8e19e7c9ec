"""The answer to a key that does not exist: kohya's name, the wrong section, or a misspelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .catalogue import all_settings
from .kohya_names import ABBREVIATIONS, ELSEWHERE, NOT_SUPPORTED, UNNECESSARY
from .sections import SECTION_NAMES, TOP_LEVEL

_NEAR = 0.7
"""Least similarity of a suggestion: "rol" and "role" have 0.86, "train" and "train.lr" would have 0.77 in full."""

SWEEP_KEYS = ("grid", "runs")
"""Tables of a sweep file."""


def answer_unknown(name: str) -> str:
    """What to do about the unknown key ``name`` (``section.key``, or a section), to follow "unknown key NAME"."""
    section, _, key = name.rpartition(".")
    if answer := answer_by_name(key):
        return f": {answer}"
    if name in SWEEP_KEYS:
        return "; it belongs to a sweep of many runs: sdlora sweep SWEEP.toml"
    if not section:
        known = near_spelling(name, (*TOP_LEVEL, *SECTION_NAMES))
        return known or f"; the sections are {', '.join(SECTION_NAMES)}"
    beside = [setting.key for setting in all_settings() if setting.section == section]
    if near := difflib.get_close_matches(key, beside, 1, _NEAR):
        return f"; did you mean {section}.{near[0]}?"
    everywhere = {setting.key: setting.name for setting in reversed(all_settings())}
    if near := difflib.get_close_matches(key, everywhere, 1, _NEAR):
        return f"; did you mean {everywhere[near[0]]}?"
    return f"; `sdlora settings {section}` lists the keys of [{section}]"


def answer_by_name(key: str) -> str:
    """Where ``key`` is here, if it is the name of a setting, an abbreviation or an option of kohya's trainer; or ""."""
    settings = all_settings()
    if named := [setting.name for setting in settings if setting.key == key and setting.section in SECTION_NAMES]:
        return f"it is {' or '.join(named)} here"
    if key in ABBREVIATIONS:
        return f"it is {ABBREVIATIONS[key]} here"
    same = next((setting.name for setting in settings if setting.kohya == key), ELSEWHERE.get(key))
    if same:
        return f"kohya's {key} is {same} here"
    if key in UNNECESSARY:
        return f"kohya's {key} is not needed: {UNNECESSARY[key]}"
    if key in NOT_SUPPORTED:
        return f"{key} of kohya's trainer is not supported yet"
    return ""


def near_spelling(name: str, known: Iterable[str]) -> str:
    """A question for the one of ``known`` that is spelled like ``name``; "" where none is."""
    near = difflib.get_close_matches(name, list(known), 1, _NEAR)
    return f"; did you mean {near[0]}?" if near else ""
