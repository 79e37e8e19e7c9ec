"""Files with a prompt a line, each with options of its own, as A1111's script and kohya's trainer read them.

A1111 (``scripts/prompts_from_file.py``): ``--prompt "a fox" --negative_prompt "blue" --steps 10``, in the quotes of a shell.
kohya (``sample_prompts``): ``a fox --n blue --w 512 --h 768 --d 1 --l 7.5 --s 28``. Names of both work in either.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import SdloraError
from .request import MAX_CFG, MAX_SEED, RANDOM_SEED, ImageRequest, first_seed
from .samplers import SAMPLERS, read_sampler

logger = logging.getLogger(__name__)
_MOST_STEPS = 1000
_MOST_IMAGES = 10_000
_OPTION = re.compile(r"(?:^|\s+)--([A-Za-z_]\w*)(?=[\s=]|$)[\s=]*")
_WORD = re.compile(r"--([A-Za-z_]\w*)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """A prompt with what it states itself; None is what all others have."""

    prompt: str
    negative: str | None = None
    seed: int | None = None
    """Seed of its first image; -1 is a random one."""
    steps: int | None = None
    cfg: float | None = None
    width: int | None = None
    height: int | None = None
    """Width and height in pixels; where one is stated, the other is that of the command."""
    sampler: str | None = None
    schedule: str | None = None
    """Spacing of the steps, where the name of the sampler states it too: ``DPM++ 2M Karras``."""
    count: int | None = None
    """Number of images."""

    def requests(self, common: ImageRequest, count: int) -> list[ImageRequest]:
        """Its images, with seeds that count up; ``common`` and ``count`` hold what it does not state.

        Raises:
            SdloraError: one side of the size is known and the other is not.
        """
        number = count if self.count is None else self.count
        first = common.seed if self.seed is None else first_seed(self.seed, count=number)
        stated: dict[str, Any] = {
            "negative": self.negative,
            "steps": self.steps,
            "cfg": self.cfg,
            "sampler": self.sampler,
            "schedule": self.schedule,
            "size": self._size(common.size),
        }
        changes = {name: value for name, value in stated.items() if value is not None}
        own = replace(common, prompt=self.prompt, **changes)
        return [replace(own, seed=first + image) for image in range(number)]

    def _size(self, common: tuple[int, int] | None) -> tuple[int, int] | None:
        if self.width is None and self.height is None:
            return None
        width, height = (
            value or (common or (None, None))[side] for side, value in enumerate((self.width, self.height))
        )
        if width is None or height is None:
            stated = f"width {width}" if height is None else f"height {height}"
            raise SdloraError(
                f"prompt {self.prompt!r}: has {stated} alone; state both sides, or a size for all prompts"
            )
        return width, height


def read_prompts(file: str | Path) -> list[PromptLine]:
    """The prompts of a text file in UTF-8. Empty lines and those that begin with ``#`` are skipped.

    Raises:
        SdloraError: the file cannot be read or has no prompts; else one line for each option that is unknown or has a wrong
            value, with the number of its line.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SdloraError(f"{file}: no such file of prompts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SdloraError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    found: list[PromptLine] = []
    problems: list[str] = []
    for number, written in enumerate(text.splitlines(), 1):
        line = written.strip()
        if not line or line.startswith("#"):
            continue
        try:
            found.append(_read_line(line, f"{file}: line {number}"))
        except SdloraError as error:
            problems += [f"{file}: line {number}: {problem}" for problem in error.problems]
    if not found and not problems:
        problems = [f"{file}: has no prompts; write one a line"]
    if problems:
        raise SdloraError(problems)
    return found


def _read_line(line: str, where: str) -> PromptLine:
    """Raises ``SdloraError`` with each problem of ``line``."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, text in _options(line):
        field = _FIELDS.get(name.lower())
        if name.lower() in _IGNORED:
            logger.warning("%s: --%s is not followed; --out says where images are written", where, name)
        elif field is None:
            problems.append(f"--{name}: is not an option of a prompt here; there are {_KNOWN}")
        elif field in values and field != "count":
            problems.append(f"--{name}: {field} is stated twice")
        else:
            try:
                value = _READERS.get(field, str)(text)
                values[field] = value * values.get(field, 1) if field == "count" else value
            except ValueError as error:
                problems.append(f"--{name} {text}: {error}")
    if not values.get("prompt"):
        problems.append("has no prompt; write it first, or after --prompt")
    if problems:
        raise SdloraError(problems)
    if "sampler" in values:
        values["sampler"], values["schedule"] = read_sampler(values["sampler"])
    return PromptLine(**values)


def _options(line: str) -> Iterator[tuple[str, str]]:
    """Name and value of each option of ``line``; a text at its start is the prompt."""
    if not line.startswith("--"):
        prompt, *rest = _OPTION.split(line)
        yield "prompt", prompt
        yield from zip(rest[::2], (value.strip() for value in rest[1::2]), strict=True)
        return
    try:
        words = shlex.split(line)
    except ValueError:
        raise SdloraError("has a quote without its end; close it, or write \\' for an apostrophe") from None
    name, value = "", list[str]()
    for word in words:
        if match := _WORD.fullmatch(word):
            if name:
                yield name, " ".join(value)
            name, value = match[1], [match[2]] if match[2] is not None else []
        else:
            value.append(word)
    yield name, " ".join(value)


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,12}", text) or not least <= int(text) <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return int(text)

    return read


def _cfg(text: str) -> float:
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", text) or float(text) > MAX_CFG:
        raise ValueError(f"expected a number from 0 to {MAX_CFG}")
    return float(text)


def _sampler(text: str) -> str:
    if read_sampler(text)[0] in SAMPLERS:
        return text
    raise ValueError(f"is not a sampler; choose one of {', '.join(SAMPLERS)}")


_READERS: dict[str, Callable[[str], Any]] = {
    "seed": _whole(RANDOM_SEED, MAX_SEED),
    "steps": _whole(1, _MOST_STEPS),
    "width": _whole(1, 2**16),
    "height": _whole(1, 2**16),
    "count": _whole(1, _MOST_IMAGES),
    "cfg": _cfg,
    "sampler": _sampler,
}
_FIELDS = {
    **{name: name for name in ("prompt", "negative", "seed", "steps", "cfg", "width", "height", "sampler", "count")},
    "negative_prompt": "negative",
    "cfg_scale": "cfg",
    "sampler_name": "sampler",
    "n_iter": "count",
    "batch_size": "count",
    "n": "negative",
    "w": "width",
    "h": "height",
    "d": "seed",
    "l": "cfg",
    "s": "steps",
    "ss": "sampler",
}
"""Option of A1111, kohya's trainer or ``sdlora generate`` -> field of ``PromptLine``; A1111's two counts are multiplied."""
_KNOWN = ", ".join(f"--{name}" for name in _FIELDS)
_IGNORED = ("outpath_samples", "outpath_grids", "prompt_for_display", "do_not_save_samples", "do_not_save_grid")
"""A1111's options about its files and its window."""
