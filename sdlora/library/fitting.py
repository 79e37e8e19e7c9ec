"""Which LoRAs of a library fit a base: by family, names and shapes, as far as headers show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import LoraFileError
from ..families import FAMILIES
from ..formats.keys import resolve
from ..formats.safetensors_header import read_raw_header, read_table
from .entry import LoraLibrary
from .facts import shapes_by_module


def with_fits(library: LoraLibrary, base: str) -> LoraLibrary:
    """``library`` with ``fits`` and ``reason`` of each entry; ``fit_loras`` reads the weights too.

    Raises:
        BaseModelError: ``base`` cannot be used.
    """
    # Imported late since it brings torch, which nothing else here needs.
    from ..base.checkpoint import find_base

    checkpoint = find_base(base)
    family, shapes = checkpoint.family, checkpoint.module_shapes()
    of_layout: dict[str, tuple[bool, str | None]] = {}
    entries = []
    for entry in library.loras:
        if entry.family is not None and entry.family != family.name:
            found = (False, f"is for {FAMILIES[entry.family].title}, the base is {family.title}")
        else:
            if entry.layout not in of_layout:
                of_layout[entry.layout] = _fit(Path(library.folder, entry.file), shapes)
            found = of_layout[entry.layout]
        entries.append(replace(entry, fits=found[0], reason=found[1]))
    return replace(library, loras=tuple(entries))


def _fit(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[bool, str | None]:
    """Whether the file fits a base whose modules have weights of ``shapes``, and why it does not, or not all of it."""
    try:
        modules = shapes_by_module(read_table(path, read_raw_header(path, LoraFileError), LoraFileError).tensors)
    except LoraFileError:
        return False, "cannot be read any more"
    matched = resolve(modules, shapes).matched
    if not matched:
        return False, f"none of its {len(modules)} modules is in the base"
    wrong = [key for key, name in matched.items() if not _module_fits(modules[key], shapes[name])]
    if wrong:
        return False, f"{len(wrong)} of its {len(modules)} modules have other shapes, such as {wrong[0]}"
    missing = len(modules) - len(matched)
    return True, f"{missing} of its {len(modules)} modules are not in the base" if missing else None


def _module_fits(roles: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    from ..formats.lora_tensors import empty_change
    from ..lora.kinds import Scaling

    try:
        change = empty_change(roles)
    except ValueError:
        return False
    # Whether an IA³ vector is for inputs or outputs is a number that the header does not hold.
    return change.fits(shape) or (isinstance(change, Scaling) and replace(change, on_input=True).fits(shape))
