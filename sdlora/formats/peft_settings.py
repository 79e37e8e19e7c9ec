"""PEFT's configuration of an adapter: which alpha and rank each module has."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from ..errors import LoraFileError

MAX_PATTERN = 1000
"""Characters in a pattern; the longest path of a module has about 80."""
MAX_SECONDS = 5.0
"""For all patterns and modules of a file. Those of real files take milliseconds."""
_LITERAL = regex.compile(r"[\w.]+")
_LYCORIS = ("LOHA", "LOKR")
_MOST_SHOWN = 60
"""Characters of a faulty value in a message."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Alpha and rank by a configuration; None where it names none."""

    alpha: float | None = None
    rank: float | None = None
    whole_factors: bool = False
    """Whether alpha / rank counts for LoKr without a product too, as PEFT has it and LyCORIS not."""


def scales_in(path: Path, metadata: Mapping[str, str]) -> Callable[[str], Scale]:
    """From the header of a diffusers file (``lora_adapter_metadata``): keys are a part, a dot, a PEFT setting.

    Raises:
        LoraFileError: the header is not JSON, an alpha or a rank is not a finite number, or a pattern is no regular
            expression or takes too long.
    """
    try:
        flat = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as fault:
        raise LoraFileError(f"{path}: lora_adapter_metadata cannot be read as JSON: {fault}") from None
    if not isinstance(flat, dict):
        raise LoraFileError(f"{path}: lora_adapter_metadata is {_shown(flat)}; expected a JSON object")
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        settings.setdefault(f"{part}.", {})[name] = value
    return scales_from(path, settings)


def scales_from(path: Path, settings: Mapping[str, Mapping[str, Any]]) -> Callable[[str], Scale]:
    """``settings`` is prefix of the modules -> PEFT's configuration; rsLoRA's alpha is returned times √rank.

    Raises:
        LoraFileError: as ``scales_in``.
    """
    if faults := [fault for prefix, setting in settings.items() for fault in _faults(path, prefix, setting)]:
        raise LoraFileError(faults)
    clock = _Clock()
    readers = {prefix: _reader(path, setting, clock) for prefix, setting in settings.items()}

    def scale_of(key: str) -> Scale:
        for prefix, read in readers.items():
            if key.startswith(prefix):
                return read(key.removeprefix(prefix))
        return Scale()

    return scale_of


def _faults(path: Path, prefix: str, setting: Mapping[str, Any]) -> Iterator[str]:
    """A line for each alpha and rank of ``setting`` that PEFT could not compute with; null counts as absent."""
    for key in ("alpha" if setting.get("peft_type") in _LYCORIS else "lora_alpha", "r"):
        value = setting.get(key)
        if value is not None and _number(value) is None:
            yield f"{path}: {prefix}{key} is {_shown(value)}; expected a finite number"
    for key in ("alpha_pattern", "rank_pattern"):
        patterns = setting.get(key)
        if patterns is not None and not isinstance(patterns, dict):
            yield f"{path}: {prefix}{key} is {_shown(patterns)}; expected an object of patterns and numbers"
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if _number(value) is None:
                yield f"{path}: {prefix}{key} has {_shown(value)} for {_shown(pattern)}; expected a finite number"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _reader(path: Path, setting: Mapping[str, Any], clock: _Clock) -> Callable[[str], Scale]:
    lycoris = setting.get("peft_type") in _LYCORIS
    alphas = _Patterns(path, "alpha_pattern", setting, clock)
    ranks = _Patterns(path, "rank_pattern", setting, clock)
    named_alpha, named_rank = setting.get("alpha" if lycoris else "lora_alpha"), setting.get("r")

    def read(module: str) -> Scale:
        alpha, rank = _number(alphas.value(module, named_alpha)), _number(ranks.value(module, named_rank))
        if alpha is not None and rank and setting.get("use_rslora"):
            alpha *= abs(rank) ** 0.5
        return Scale(alpha=alpha, rank=rank, whole_factors=lycoris)

    return read


def _number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


class _Clock:
    """Time left for the patterns of one file."""

    def __init__(self) -> None:
        self.left = MAX_SECONDS


class _Patterns:
    """Regular expressions ``(.*\\.)?(pattern)$`` on a module's path; the first that matches names the value."""

    def __init__(self, path: Path, key: str, setting: Mapping[str, Any], clock: _Clock) -> None:
        patterns = setting.get(key)
        self._where = f"{path}: {key}"
        self._clock = clock
        self._values = list(patterns.values()) if isinstance(patterns, dict) else []
        self._literal: dict[tuple[int, ...], dict[str, int]] = {}
        self._others: list[tuple[int, str, Any]] = []
        for index, pattern in enumerate(patterns) if isinstance(patterns, dict) else ():
            if _LITERAL.fullmatch(pattern):
                dots = tuple(i for i, character in enumerate(pattern) if character == ".")
                self._literal.setdefault((len(pattern), *dots), {}).setdefault(pattern, index)
            else:
                self._others.append((index, pattern, self._compiled(pattern)))

    def value(self, module: str, default: object) -> object:
        first = min((index for index in self._literal_matches(module)), default=len(self._values))
        for index, pattern, compiled in self._others:
            if index > first:
                break
            if self._matches(pattern, compiled, module):
                first = index
                break
        return self._values[first] if first < len(self._values) else default

    def _literal_matches(self, module: str) -> list[int]:
        """Patterns of letters and dots, where a dot is any character: found by the places of their dots."""
        found = []
        for (length, *dots), patterns in self._literal.items():
            start = len(module) - length
            if start < 0 or (start and module[start - 1] != "."):
                continue
            end = list(module[start:])
            for dot in dots:
                end[dot] = "."
            index = patterns.get("".join(end))
            if index is not None:
                found.append(index)
        return found

    def _compiled(self, pattern: str) -> Any:
        if len(pattern) > MAX_PATTERN:
            raise LoraFileError(
                f"{self._where} {pattern[:40]!r}… is {len(pattern):,} characters long; shorten it to {MAX_PATTERN:,}"
            )
        try:
            return regex.compile(rf"(.*\.)?({pattern})$")
        except (regex.error, OverflowError, RecursionError, MemoryError) as fault:
            raise LoraFileError(
                f"{self._where} {pattern!r} is not a regular expression ({fault}); correct it, or write the module's name"
            ) from None

    def _matches(self, pattern: str, compiled: Any, module: str) -> bool:
        start = time.monotonic()
        try:
            if self._clock.left <= 0:
                raise TimeoutError
            return compiled.match(module, timeout=self._clock.left) is not None
        except TimeoutError:
            raise LoraFileError(
                f"{self._where} {pattern!r} takes longer than {MAX_SECONDS:g} s to match; write the modules' names instead"
            ) from None
        finally:
            self._clock.left -= time.monotonic() - start
