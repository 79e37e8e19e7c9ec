"""Wildcards of prompts: ``__animal__`` is a line of ``animal.txt``, chosen by the seed of the image, as alternatives are."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import SdloraError
from . import alternatives
from .request import ImageRequest

WILDCARD = re.compile(r"(?<!\w)__(\S+?)__(?!\w)")
"""As A1111's extension and sd-dynamic-prompts write it; ``__colours/warm__`` is a file in a subfolder."""
_COMMENT = "#"


class Wildcards:
    """The text files of a folder, read when a prompt first names them."""

    def __init__(self, folder: Path):
        """Raises ``SdloraError`` where there is no such folder."""
        if not folder.is_dir():
            raise SdloraError(f"{folder}: no such folder of wildcards")
        self.folder = folder
        self._entries: dict[str, list[str]] = {}

    def chosen(self, text: str, seed: int) -> str:
        """``text`` with one of the alternatives in place of each ``{a|b}``, then an entry in place of each wildcard.

        An entry may hold both. The choice depends on ``text`` and ``seed`` alone. Python's ``random.Random(seed)`` chooses
        for one wildcard after another, so without alternatives it is what A1111's extension chooses for the same seed and
        files without empty lines and comments.

        Raises:
            SdloraError: with one line for each wildcard without a file, or with a file that has no entries or names itself,
                and as ``alternatives.drawn``.
        """
        draw, problems = random.Random(seed), dict[str, None]()

        def fill(part: str, above: tuple[str, ...]) -> str:
            def entry(match: re.Match[str]) -> str:
                name = match[1]
                if name in above:
                    chain = " in ".join(f"__{one}__" for one in reversed((*above, name)))
                    problems[f"prompt: {chain}: a wildcard may not contain itself"] = None
                    return ""
                try:
                    return fill(draw.choice(self._lines(name)), (*above, name))
                except SdloraError as error:
                    problems.update(dict.fromkeys(error.problems))
                    return ""

            return WILDCARD.sub(entry, alternatives.drawn(part, draw))

        filled = fill(text, ())
        if problems:
            raise SdloraError(list(problems))
        return filled

    def _lines(self, name: str) -> list[str]:
        if name not in self._entries:
            self._entries[name] = self._read(name)
        return self._entries[name]

    def _read(self, name: str) -> list[str]:
        file = self.folder / f"{name}.txt"
        if not file.is_file() or not file.resolve().is_relative_to(self.folder.resolve()):
            known = [path.relative_to(self.folder).with_suffix("").as_posix() for path in self.folder.rglob("*.txt")]
            near = difflib.get_close_matches(name, sorted(known), 1, 0.5)
            nearest = f"; did you mean __{near[0]}__?" if near else ""
            raise SdloraError(f"prompt: __{name}__: there is no file {name}.txt in {self.folder}{nearest}")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise SdloraError(f"{file}: cannot be read as UTF-8 text ({error})") from None
        lines = [line.strip() for line in text.splitlines()]
        entries = [line for line in lines if line and not line.startswith(_COMMENT)]
        if not entries:
            raise SdloraError(f"{file}: has no entries; write one a line")
        return entries


def choose_texts(requests: Sequence[ImageRequest], wildcards: Wildcards | None = None) -> list[ImageRequest]:
    """``requests`` as ``Wildcards.chosen`` makes them, by their own seeds; without ``wildcards``, ``__names__`` stay.

    Raises:
        SdloraError: as ``Wildcards.chosen``, with the problems of all requests.
    """
    problems: dict[str, None] = {}
    found = []
    for request in requests:
        changes: dict[str, str] = {}
        for name in ("prompt", "negative"):
            written: str = getattr(request, name)
            try:
                if wildcards is None:
                    chosen = alternatives.drawn(written, random.Random(request.seed))
                else:
                    chosen = wildcards.chosen(written, request.seed)
            except SdloraError as error:
                problems.update(dict.fromkeys(error.problems))
                continue
            if chosen != written:
                changes |= {name: chosen, f"{name}_template": written}
        found.append(replace(request, **changes))
    if problems:
        raise SdloraError(list(problems))
    return found
