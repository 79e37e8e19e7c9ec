"""From axes to the cells of a grid: what each is drawn from, in which order, and the name by which it is known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from .._version import __version__
from ..base.checkpoint import BaseCheckpoint
from ..errors import SdloraError
from ..formats.inversion_file import Inversion
from ..generation.lora_choice import LoraChoice
from ..generation.prompt_folders import PromptFolders
from ..generation.request import ImageRequest
from ..generation.tags import check_named_once
from .axes import DIRECTIONS, Axis
from .changes import Draft


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One image of a grid. Those with weight 0 are not among ``loras``."""

    place: tuple[int, int, int]
    """Column, row, sheet."""
    request: ImageRequest
    loras: tuple[LoraChoice, ...]


def make_cells(
    request: ImageRequest, loras: Sequence[LoraChoice], axes: Sequence[Axis], folders: PromptFolders
) -> list[Cell]:
    """All cells, by sheet, row and column. ``folders`` are where prompts find what they name.

    Raises:
        SdloraError: with one line for each axis that has nothing to change, and each wrong tag.
    """
    by_direction = {axis.direction: axis for axis in axes}
    ranges = [range(len(by_direction[d].labels) if d in by_direction else 1) for d in reversed(DIRECTIONS)]
    start = Draft(request=request, loras=tuple(loras))
    places = [(x, y, z) for z, y, x in product(*ranges)]
    ordered = sorted(axes, key=lambda axis: axis.rank)
    _check(start, ordered)
    drafts = []
    for place in places:
        draft = start
        for axis in ordered:
            draft = axis.changes[place[DIRECTIONS.index(axis.direction)]](draft)
        drafts.append(draft)
    tagged = folders.read([draft.request for draft in drafts])
    cells = []
    for place, draft, entry in zip(places, drafts, tagged, strict=True):
        named = [*draft.loras, *entry.loras]
        check_named_once(named)
        heavy = tuple(lora for lora in named if lora.unet or lora.text_encoder)
        cells.append(Cell(place=place, request=entry.request, loras=heavy))
    return cells


def _check(start: Draft, axes: Sequence[Axis]) -> None:
    problems = []
    names = [lora.name for lora in start.loras]
    for axis in axes:
        if axis.kind == "lora":
            names += [lora.name for change in axis.changes for lora in change(start).loras[len(start.loras) :]]
        if axis.kind in ("weight", "step"):
            known = ", ".join(dict.fromkeys(names))
            if not names:
                problems.append(f"{axis.direction}: {axis.kind} has no LoRA to change; name one with lora")
            elif axis.target is not None and axis.target not in names:
                problems.append(f"{axis.direction}: {axis.target} is none of the LoRAs; they are {known}")
            elif axis.kind == "step" and axis.target is None and len(set(names)) > 1:
                problems.append(f"{axis.direction}: step is that of which LoRA? Write step@NAME with one of {known}")
        if axis.kind == "strength" and start.request.start is None:
            problems.append(f"{axis.direction}: strength is that of an image to draw over; name one with image")
        if axis.search is not None and axis.search not in f"{start.request.prompt}\n{start.request.negative}":
            problems.append(
                f"{axis.direction}: the prompt does not have the text {axis.search!r}, which is to be replaced"
            )
    if problems:
        raise SdloraError(problems)


def in_drawing_order(cells: Sequence[Cell]) -> list[Cell]:
    """``cells`` so that those with the same LoRAs follow each other, and among them those with the same settings.

    LoRAs change as seldom as there are different sets, and images that can be drawn together are neighbours.
    """
    first: dict[tuple[object, ...], int] = {}

    def place(*key: object) -> int:
        return first.setdefault(key, len(first))

    keyed = [
        (place("loras", cell.loras), place("settings", cell.request.settings), number)
        for number, cell in enumerate(cells)
    ]
    return [cells[number] for _, _, number in sorted(keyed)]


def cell_key(cell: Cell, hashes: Mapping[Path, str], base: BaseCheckpoint, *, precision: str) -> str:
    """A name of everything that makes the image: 32 hexadecimal digits.

    Other settings, other tensors in a LoRA or in the base, or another version of sdlora have another name; the names and
    places of files do not count.

    Args:
        hashes: file of each LoRA -> hash of its tensors.
    """
    facts = {
        "version": __version__,
        "base": [base.fingerprint, asdict(base.schedule), base.clip_skip, base.resolution, base.quantization],
        "precision": precision,
        "request": _facts(cell.request),
        "loras": [{**asdict(lora), "file": hashes[lora.file]} for lora in cell.loras],
    }
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _facts(value: Any) -> Any:
    """``value`` as JSON can hold it; images and textual inversions as hashes of what they are."""
    if isinstance(value, Inversion):
        return [value.words, value.sha256]
    if isinstance(value, tuple):
        return [_facts(each) for each in value]
    if is_dataclass(value):
        return {field.name: _facts(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Image.Image):
        return [value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    return value
