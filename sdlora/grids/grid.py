"""The public function ``grid``: one prompt over two or three axes, drawn cell by cell, resumed where it stopped."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from .._version import __version__
from ..base.checkpoint import BaseCheckpoint, find_base
from ..config.sections import BaseSection
from ..errors import SdloraError
from ..files import check_target, write_whole
from ..generation.arguments import DrawingOptions, LoraArgument, base_argument, image_requests, lora_choices
from ..generation.numbers import check_counts
from ..generation.prompt_folders import PromptFolders
from ..generation.prompt_syntax import check_syntax
from ..generation.request import ImageRequest
from ..generation.saving import FORMATS, encoded
from ..generation.studio import OpenStudio
from ..progress import Progress, progress_or_bar
from .axes import DIRECTIONS, Axis, AxisArgument, read_axes
from .cells import Cell, make_cells
from .drawing import cell_keys, draw_cells, read_cell
from .sheet import MOST_PIXELS, labelled_sheet


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """A finished grid."""

    image: Image.Image
    """All cells with their labels."""
    file: Path
    folder: Path
    """``NAME.cells`` beside it: an image for each cell, and ``grid.json``."""
    axes: tuple[dict[str, Any], ...]
    cells: tuple[dict[str, Any], ...]
    """By sheet, row and column: labels, file within ``folder``, and what it was made with."""
    drawn: int
    """Number of images that this call drew; those of an earlier one are used again."""

    def to_json(self) -> dict[str, Any]:
        """All but the image."""
        fields = {"image": str(self.file), "folder": str(self.folder), "drawn": self.drawn}
        return fields | {"axes": list(self.axes), "cells": list(self.cells)}


def grid(
    prompt: str,
    *,
    x: AxisArgument | None = None,
    y: AxisArgument | None = None,
    z: AxisArgument | None = None,
    out: str | Path = "out/grid.png",
    base: str | Path | BaseSection = "mini",
    loras: LoraArgument | Sequence[LoraArgument] = (),
    lora_dir: str | Path | None = None,
    wildcards: str | Path | None = None,
    negative: str = ImageRequest.negative,
    seed: int = ImageRequest.seed,
    steps: int = ImageRequest.steps,
    cfg: float = ImageRequest.cfg,
    size: int | tuple[int, int] | None = ImageRequest.size,
    sampler: str = ImageRequest.sampler,
    scale: int = 1,
    precision: str = "auto",
    vae_tiling: bool = False,
    batch_size: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = lambda line: None,
    **drawing: Unpack[DrawingOptions],
) -> Grid:
    """Draw ``prompt`` for all combinations of the values of the axes; write the labelled image and what it is made of.

    Each cell is a file in ``NAME.cells`` beside ``out`` as soon as it is drawn, named by what makes it: the same call goes
    on where an earlier one stopped, and one with more values draws what is missing.

    Args:
        x, y, z: columns, rows and sheets: ``KIND:VALUE,VALUE``, or (kind, values); see ``axes.KINDS`` for the kinds.
        out: ``.png``, ``.jpg``, ``.jpeg`` or ``.webp``.
        loras: what all cells have; an axis ``lora`` adds to them.
        seed: 0 to 2**32 - 1. Not random: a cell is known again by its seed.
        scale: how many times the labelled image is enlarged, without smoothing.
        base, lora_dir, wildcards, negative, steps, cfg, size, sampler, precision, vae_tiling, batch_size: as in
            ``generate``.
        progress, stop, say, drawing: as in ``generate``.

    Raises:
        SdloraError: the prompt, a setting, an axis, a LoRA or the base cannot be used, found before anything is drawn.
        TargetError: ``out`` cannot be written to.
        Interrupted: ``stop`` was set; the cells that were drawn are kept.
    """
    file = _target(out)
    axes = read_axes({"x": x, "y": y, "z": z})
    check_counts(scale=scale)
    if not isinstance(prompt, str):
        raise SdloraError(f"prompt is a {type(prompt).__name__}; expected a text; for several, an axis prompt")
    if seed is None or seed < 0:
        raise SdloraError(
            f"seed {seed}: a cell of a grid is known again by its seed; give one from 0, or an axis seed:1,2"
        )
    (request,) = image_requests(
        prompt, seed=seed, count=1, size=size, negative=negative, steps=steps, cfg=cfg, sampler=sampler, **drawing
    )
    cells = make_cells(request, lora_choices(loras), axes, PromptFolders.of(lora_dir, wildcards))
    check_syntax((cell.request.prompt for cell in cells), (cell.request.negative for cell in cells))
    checkpoint = find_base(base_argument(base))
    _check_size(cells, checkpoint, scale)
    place = file.with_name(f"{file.stem}.cells")
    studio = OpenStudio(checkpoint, precision=precision, vae_tiling=vae_tiling, batch_size=batch_size)
    with studio, progress_or_bar(progress) as reports:
        keys = cell_keys(cells, checkpoint, precision=precision, progress=reports)
        wanted = dict(zip(keys, cells, strict=True))
        drawn = draw_cells(wanted, place, studio, progress=reports, stop=stop, say=say)
    return _finished(file, place, axes, list(zip(keys, cells, strict=True)), checkpoint, scale=scale, drawn=drawn)


def _finished(
    file: Path,
    place: Path,
    axes: Sequence[Axis],
    cells: Sequence[tuple[str, Cell]],
    base: BaseCheckpoint,
    *,
    scale: int,
    drawn: int,
) -> Grid:
    """Write the labelled image and the JSON of ``cells``, all of which are in ``place``."""
    images, records = {}, []
    for key, cell in cells:
        found = read_cell(place, key)
        if found is None:
            raise SdloraError(
                f"{place}: the image of a cell has been removed or damaged meanwhile; give the command again"
            )
        images[cell.place], parameters = found
        records.append(_record(cell, axes, key, parameters, base))
    sheet = labelled_sheet(images, axes, scale=scale)
    stated = tuple({"direction": a.direction, "kind": a.kind, "lora": a.target, "values": list(a.labels)} for a in axes)
    _write(file, sheet, "\n\n".join(dict.fromkeys(record["parameters"] for record in records)))
    report = {"version": __version__, "base": base.name, "axes": stated, "cells": records}
    write_whole(place / "grid.json", json.dumps(report, ensure_ascii=False, indent=1).encode())
    return Grid(image=sheet, file=file, folder=place, axes=stated, cells=tuple(records), drawn=drawn)


def _target(out: str | Path) -> Path:
    file = Path(out).expanduser()
    if file.suffix.lower() not in FORMATS:
        raise SdloraError(f"{out}: name an image file to write, which ends in one of {', '.join(FORMATS)}")
    check_target(file)
    check_target(file.with_name(f"{file.stem}.cells"), "folder")
    return file


def _check_size(cells: Sequence[Cell], base: BaseCheckpoint, scale: int) -> None:
    width, height = map(max, zip(*(cell.request.final_size_on(base) for cell in cells), strict=True))
    if len(cells) * width * height * scale**2 > MOST_PIXELS:
        raise SdloraError(
            f"{len(cells):,} cells of {width} x {height} pixels are over {MOST_PIXELS / 1e6:.0f} million pixels together; "
            "use fewer values or a smaller size"
        )


def _record(cell: Cell, axes: Sequence[Axis], key: str, parameters: str, base: BaseCheckpoint) -> dict[str, Any]:
    """What the JSON says of a cell."""
    by_direction = {axis.direction: axis for axis in axes}
    labels = {
        direction: by_direction[direction].labels[number]
        for direction, number in zip(DIRECTIONS, cell.place, strict=True)
        if direction in by_direction
    }
    request = cell.request
    settings: dict[str, Any] = {field.name: getattr(request, field.name) for field in fields(request)}
    settings["start"] = None if request.start is None else {"strength": request.start.strength}
    settings["inversions"] = [inversion.words[0] for inversion in request.inversions]
    settings["hires"] = None if request.hires is None else asdict(request.hires)
    loras = [{"name": lora.name, "weights": lora.tag} for lora in cell.loras]
    made = settings | {"size": cell.request.final_size_on(base), "loras": loras, "parameters": parameters}
    return labels | {"file": f"{key}.png"} | made


def _write(file: Path, sheet: Image.Image, parameters: str) -> None:
    try:
        data = encoded(sheet, file.suffix, parameters)
    except (OSError, ValueError) as error:
        raise SdloraError(
            f"{file}: an image of {sheet.width} x {sheet.height} pixels cannot be written as {file.suffix} ({error}); "
            "name a .png; the cells are kept"
        ) from None
    write_whole(file, data)
