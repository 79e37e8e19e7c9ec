"""LoRA files with their weights, checked against a base before anything is merged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..errors import CompatibilityError, LoraFileError
from ..families import Family
from ..formats.hashes import file_hashes
from ..formats.keys import part_of, resolve
from ..formats.lora_file import LoraFile, read_lora
from ..formats.metadata import safe_title
from ..lora.change import Change
from .blocks import BlockWeights, block_factors
from .lora_choice import LoraChoice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedLora:
    """A LoRA whose modules are named as the base names them."""

    file: LoraFile
    modules: Mapping[str, Change]
    stamp: tuple[int, int] | None
    """Size and modification time of its file, in bytes and nanoseconds."""
    autov3: str | None
    """First 12 digits of the hash over its tensors; None for a pickle."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedLora:
    """A LoRA that fits the base, at the weights of ``choice``."""

    fitted: FittedLora
    choice: LoraChoice
    factors: Mapping[str, float] | None = None
    """Canonical name -> factor of its block, where the choice has weights of blocks."""

    @property
    def tag_name(self) -> str:
        """What ``<lora:NAME:1>`` calls it: the file's name, or the name in its metadata, by which A1111 finds it too.

        Where neither can be written in a tag, the file's name with other characters replaced; A1111 and Civitai find it
        by its hash then.
        """
        names = (self.choice.name, self.fitted.file.metadata.get("ss_output_name", ""))
        return next((name for name in names if name and safe_title(name) == name), safe_title(names[0]))

    def times(self, factor: float) -> WeightedLora:
        """The same LoRA at ``factor`` times its weights."""
        return replace(self, choice=self.choice.times(factor))

    def changes(self) -> dict[str, tuple[Change, float]]:
        """Canonical name -> (change, weight), as ``lora.stack.Stack`` takes it."""
        return {
            name: (change, weight * (1.0 if self.factors is None else self.factors[name]))
            for name, change in self.fitted.modules.items()
            for weight in (self.choice.unet if _in_unet(name) else self.choice.text_encoder,)
        }


def stacked(loras: Sequence[WeightedLora]) -> tuple[list[dict[str, tuple[Change, float]]], list[int]]:
    """What ``Stack.set`` takes: the changes, and the positions of those that vary with the steps.

    Of a LoRA with a start or a stop, the changes of the UNet vary, and those of the text encoders are an entry of their own.
    """
    entries: list[dict[str, tuple[Change, float]]] = []
    varying = []
    for lora in loras:
        changes = lora.changes()
        if lora.choice.varies:
            varying.append(len(entries))
            entries.append({name: change for name, change in changes.items() if _in_unet(name)})
            changes = {name: change for name, change in changes.items() if not _in_unet(name)}
        entries.append(changes)
    return entries, varying


def _in_unet(name: str) -> bool:
    return name.startswith("unet.")


class LoraBase(Protocol):
    """What LoRAs are matched with: a checkpoint, or the models of a pipeline."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def family(self) -> Family:
        """What it is."""

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of the weight."""


def fit_loras(
    base: LoraBase, choices: Sequence[LoraChoice], *, known: Sequence[FittedLora] = ()
) -> tuple[WeightedLora, ...]:
    """Read every file and match it with the base's modules by names and shapes; what is left out is logged.

    The base need not be loaded. Files that are among ``known``, of the same base, and have not changed are not read again.

    Raises:
        LoraFileError, CompatibilityError: with one line for each file that cannot be used.
    """
    shapes = base.module_shapes()
    read = {lora.file.path: lora for lora in known}
    fitted: dict[Path, FittedLora] = {}
    faults: list[LoraFileError | CompatibilityError] = []
    factors: dict[BlockWeights, dict[str, float]] = {}
    for file in dict.fromkeys(choice.file for choice in choices):
        try:
            unchanged = file in read and read[file].stamp == _stamp(read[file].file.weights)
            fitted[file] = read[file] if unchanged else _fit(base, shapes, read_lora(file))
        except (LoraFileError, CompatibilityError) as error:
            faults.append(error)
    for choice in choices:
        if choice.blocks is not None and choice.blocks not in factors:
            try:
                factors[choice.blocks] = block_factors(choice.blocks, shapes, base.family)
            except CompatibilityError as error:
                faults.append(CompatibilityError(f"{choice.file}: {error}"))
    if faults:
        raise type(faults[0])([problem for fault in faults for problem in fault.problems])
    return tuple(
        WeightedLora(
            fitted=fitted[choice.file], choice=choice, factors=None if choice.blocks is None else factors[choice.blocks]
        )
        for choice in choices
    )


def check_numbers(file: LoraFile) -> None:
    """Raises ``LoraFileError`` where modules of ``file`` hold NaN or infinity."""
    if file.broken:
        raise LoraFileError(
            f"{file.path}: {len(file.broken)} of its {len(file.modules) + len(file.unusable)} modules hold NaN or infinity, "
            f"such as {file.broken[0]}: its training has failed; use another file, or an earlier step of the run"
        )


def _fit(base: LoraBase, shapes: Mapping[str, tuple[int, ...]], file: LoraFile) -> FittedLora:
    found = resolve(file.modules, shapes)
    total, matched = len(file.modules), len(found.matched)
    family, base_family = file.family, base.family
    kind = f"a LoRA for {family.title}" if family else "a LoRA of an unknown family"
    if family and family is not base_family:
        raise CompatibilityError(
            f"{file.path}: {kind}; the base {base.name} is {base_family.title}: "
            f"use it with a {family.title} base, or use a LoRA for {base_family.title} here"
        )
    if not matched:
        raise CompatibilityError(f"{file.path}: none of its {total} modules is in the base {base.name}")
    check_numbers(file)
    found.check(file.path)
    misfits = [key for key, name in found.matched.items() if not file.modules[key].fits(shapes[name])]
    if misfits:
        in_file, in_base = file.modules[misfits[0]].weight_shape, shapes[found.matched[misfits[0]]]
        sizes = f"{in_file} in the file, {in_base} in the base" if in_file else f"the base has {in_base}"
        raise CompatibilityError(
            f"{file.path}: {kind} of another architecture: {len(misfits)} of {total} modules do not fit the base "
            f"{base.name} (for example {misfits[0]}: {sizes})"
        )
    for problem in file.problems:
        logger.warning("%s: %s; ignored", file.path, problem)
    if found.unmatched:
        parts = sorted({(part_of(key) or "unknown").replace("_", " ") for key in found.unmatched})
        logger.warning(
            "%s: %d of %d modules matched in the base %s; missing: %s (such as %s)",
            *(file.path, matched, total, base.name, ", ".join(parts), found.unmatched[0]),
        )
    return FittedLora(
        file=file,
        modules={name: file.modules[key] for key, name in found.matched.items()},
        stamp=_stamp(file.weights),
        autov3=file_hashes(file.weights).autov3,
    )


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and modification time; None where there is no file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
