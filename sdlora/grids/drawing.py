"""Cells become files, each as soon as it is drawn; one that is there already is not drawn again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..base.checkpoint import BaseCheckpoint
from ..errors import Interrupted
from ..formats.hashes import file_hashes
from ..formats.lora_names import PEFT_WEIGHTS
from ..generation.lora_choice import LoraChoice
from ..generation.loras import fit_loras
from ..generation.request import check_requests
from ..generation.saving import save_png
from ..generation.studio import OpenStudio, images_in_turn
from ..generation.tags import without_effect
from ..progress import Progress
from .cells import Cell, cell_key, in_drawing_order

if TYPE_CHECKING:
    from ..generation.images import GeneratedImage


def cell_keys(cells: Sequence[Cell], base: BaseCheckpoint, *, precision: str, progress: Progress) -> list[str]:
    """The ``cell_key`` of each cell; requests are checked before, and LoRA files are read for their hashes.

    Raises:
        SdloraError: a setting does not work on ``base``, or a file cannot be read, with one line for each.
    """
    check_requests([cell.request for cell in cells], base)
    choices = _choices(cells)
    hashes: dict[Path, str] = {}
    for file in dict.fromkeys(choice.file for choice in choices):
        try:
            found = file_hashes(file / PEFT_WEIGHTS if file.is_dir() else file, progress)
        except OSError:
            fit_loras(base, choices)  # Raises, with a line for each file that cannot be used.
            raise
        hashes[file] = found.payload_sha256 or found.sha256
    return [cell_key(cell, hashes, base, precision=precision) for cell in cells]


def draw_cells(
    cells: Mapping[str, Cell],
    folder: Path,
    studio: OpenStudio,
    *,
    progress: Progress,
    stop: threading.Event | None,
    say: Callable[[str], None],
) -> int:
    """Draw those of ``cells``, by key, that ``folder`` does not have as ``KEY.png``; returns their number.

    Raises:
        SdloraError: a LoRA does not fit the base; nothing is drawn then.
        OSError: a file cannot be written.
        Interrupted: ``stop`` was set; what was drawn is there.
    """
    missing = {key: cell for key, cell in cells.items() if read_cell(folder, key) is None}
    if not missing:
        return 0
    ordered = in_drawing_order(list(missing.values()))
    names = {id(cell): key for key, cell in missing.items()}
    choices = _choices(ordered)
    prepared = studio.prepared([cell.request for cell in ordered], choices, say)
    by_choice = dict(zip(choices, prepared.loras, strict=True))
    own = [(cell.request, [by_choice[choice] for choice in cell.loras]) for cell in ordered]
    for line in without_effect(own):
        say(line)
    written: list[Path] = []
    waiting = iter(ordered)

    def write(image: GeneratedImage) -> None:
        file = folder / f"{names[id(next(waiting))]}.png"
        save_png(image.image, file, image.parameters)
        written.append(file)

    progress.start("Drawing cells", sum(cell.request.all_steps for cell in ordered))
    try:
        images_in_turn(prepared, own, progress=_OneTask(progress), stop=stop, on_image=write)
    except (Interrupted, KeyboardInterrupt) as error:
        done = len(cells) - len(missing) + len(written)
        raise Interrupted(
            f"interrupted: {done} of {len(cells)} cells are drawn; the same command goes on",
            terminated=getattr(error, "terminated", False),
        ) from None
    return len(written)


def read_cell(folder: Path, key: str) -> tuple[Image.Image, str] | None:
    """The image of a cell and its parameters; None where there is none, or its file is damaged."""
    try:
        with Image.open(folder / f"{key}.png") as opened:
            parameters = opened.info.get("parameters", "")
            return opened.convert("RGB"), parameters
    except (OSError, SyntaxError, ValueError):  # What Pillow raises for a file that is no whole image.
        return None


def _choices(cells: Sequence[Cell]) -> list[LoraChoice]:
    return list(dict.fromkeys(choice for cell in cells for choice in cell.loras))


class _OneTask:
    """The reports of several tasks as those of one."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def start(self, task: str, total: int, done: int = 0) -> None:
        """Already reported, for all."""

    def advance(self, count: int = 1, note: str = "") -> None:
        self._progress.advance(count, note)
