"""The images of a growing sample sheet, a file for each, so that none is drawn twice."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image

from ..files import write_png
from ..generation.request import ImageRequest
from .checkpoint import RunIdentity

CELL_KEY = "sdlora_sample"
"""Key of the text in an image that says which run drew it, from which request."""


class SampleCells:
    """The folder ``NAME.samples`` beside the output, with ``000200-1.png`` for the first prompt after 200 steps.

    Only images that this run drew from the same request count. The folder stays when the run is complete.
    """

    def __init__(self, output: Path, identity: RunIdentity, requests: Sequence[ImageRequest]):
        """``requests`` are those of the sheet's columns."""
        self._folder = output.with_suffix(".samples")
        self._identity, self._requests = identity, requests

    def missing(self, step: int) -> list[int]:
        """Numbers of the requests of which there is no image after ``step`` steps."""
        return [number for number in range(len(self._requests)) if not self._is_own(self._file(step, number), number)]

    def put(self, step: int, number: int, image: Image.Image) -> None:
        """Keep the image of a request after ``step`` steps. Raises as ``files.write_whole``."""
        text = json.dumps({"run": self._identity.to_json(), "request": stated([self._requests[number]])})
        write_png(self._file(step, number), image, [(CELL_KEY, text)])

    def rows(self) -> dict[int, list[Image.Image]]:
        """Step -> its images, in order of the steps; a white one in place of each that is missing."""
        found: dict[int, dict[int, Image.Image]] = {}
        for step, number, file in self._files():
            if number < len(self._requests) and self._is_own(file, number):
                with Image.open(file) as image:
                    found.setdefault(step, {})[number] = image.convert("RGB")
        return {step: _filled(found[step], len(self._requests)) for step in sorted(found)}

    def remove(self) -> None:
        """Remove what earlier runs for this output drew, and the folder if nothing else is in it."""
        for _, _, file in self._files():
            if _facts(file) is not None:
                file.unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _file(self, step: int, number: int) -> Path:
        return self._folder / f"{step:06}-{number + 1}.png"

    def _files(self) -> list[tuple[int, int, Path]]:
        """Step, number of the request, and file, of all that have the name of a cell."""
        names = [re.fullmatch(r"(\d{6,})-([1-9]\d*)\.png", file.name) for file in _entries(self._folder)]
        return [(int(name[1]), int(name[2]) - 1, self._folder / name[0]) for name in names if name]

    def _is_own(self, file: Path, number: int) -> bool:
        facts = _facts(file)
        if facts is None:
            return False
        run, request = facts
        differences = self._identity.differences(replace(run, device=None, precision=None))
        return not differences and request == stated([self._requests[number]])


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def stated(requests: Sequence[ImageRequest]) -> str:
    """``requests`` as text; equal ones give equal text."""
    return json.dumps([asdict(request) for request in requests], sort_keys=True)


def _facts(file: Path) -> tuple[RunIdentity, str] | None:
    """The run that drew ``file``, and the request; None where it is not such an image."""
    try:
        with Image.open(file) as image:
            stated = json.loads(image.info[CELL_KEY])
        return RunIdentity.from_json(stated["run"]), stated["request"]
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        return None


def _filled(images: dict[int, Image.Image], count: int) -> list[Image.Image]:
    blank = Image.new("RGB", next(iter(images.values())).size, "white")
    return [images.get(number, blank) for number in range(count)]
