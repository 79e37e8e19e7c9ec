"""LoRA files whose modules have the names of a base, for the tools that compute with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ..base.checkpoint import BaseCheckpoint, find_base
from ..errors import CompatibilityError, LoraFileError
from ..families import Family
from ..files import check_target
from ..formats.keys import resolve
from ..formats.lora_file import LoraFile, read_lora
from ..formats.published import published_modules
from ..formats.tensor_files import read_tensors
from ..generation.blocks import block_factors
from ..generation.loras import LoraChoice
from ..lora.change import Change


@dataclass(frozen=True, kw_only=True, eq=False)
class Modules:
    """The modules that LoRA files name: those of a base, or of the published checkpoints of a family."""

    family: Family
    shapes: Mapping[str, tuple[int, ...]]
    """Canonical name -> shape of the weight."""
    base: BaseCheckpoint | None
    """None where only names and shapes are known."""

    @classmethod
    def of(cls, lora: LoraFile, base: str | None) -> Modules:
        """Those of ``base``, or else of the family of ``lora``.

        Raises:
            BaseModelError: ``base`` cannot be used; LoraFileError: without it, nothing shows the family.
        """
        if base:
            checkpoint = find_base(base)
            return cls(family=checkpoint.family, shapes=checkpoint.module_shapes(), base=checkpoint)
        if lora.family is None:
            raise LoraFileError(
                f"{lora.path}: names, shapes and metadata do not show its family; name its base with --base"
            )
        return cls(family=lora.family, shapes=published_modules(lora.family.name), base=None)

    def named(self, lora: LoraFile) -> NamedLora:
        """``lora`` with canonical names.

        Raises:
            LoraFileError: it is of another family, or one of its modules is not among these, has another shape, or is there
                twice.
        """
        if lora.family is not None and lora.family is not self.family:
            raise LoraFileError(f"{lora.path}: a LoRA for {lora.family.title}, expected one for {self.family.title}")
        found = resolve(lora.modules, self.shapes)
        found.check(lora.path)
        wrong = found.unmatched or tuple(
            key for key, name in found.matched.items() if not lora.modules[key].fits(self.shapes[name])
        )
        if wrong:
            raise LoraFileError(
                f"{lora.path}: {len(wrong)} of {len(lora.modules)} modules are not in {self.family.title}, such as "
                f"{wrong[0]}; name the base that it was made for with --base"
            )
        return NamedLora(file=lora, changes={name: lora.modules[key] for key, name in found.matched.items()})

    def weight(self, name: str, changes: Mapping[str, Change]) -> Tensor:
        """The pristine weight of a module, float32; zeros of its shape where no change depends on it.

        Args:
            changes: of this module, by the file that each comes from.

        Raises:
            LoraFileError: a change depends on the weight, and no base is given.
        """
        dependent = [file for file, change in changes.items() if change.reads_weight]
        if not dependent:
            return torch.zeros(self.shapes[name])
        if self.base is None:
            kind = changes[dependent[0]].kind
            raise LoraFileError(
                f"{dependent[0]}: its changes of kind {kind} depend on the weights of the base; name it with --base"
            )
        return pristine_weight(self.base, name)


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedLora:
    """A LoRA with canonical names."""

    file: LoraFile
    changes: Mapping[str, Change]
    """Canonical name -> change."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedFile:
    """A LoRA with canonical names, at the weights of ``choice``."""

    choice: LoraChoice
    lora: NamedLora
    factors: Mapping[str, float] | None
    """Canonical name -> factor of its block, where the choice has weights of blocks."""

    def strength(self, name: str) -> float:
        """Weight of the module with this canonical name."""
        weight = self.choice.unet if name.startswith("unet.") else self.choice.text_encoder
        return weight if self.factors is None else weight * self.factors[name]


def weighted_files(modules: Modules, choices: Sequence[LoraChoice], loras: Sequence[NamedLora]) -> list[WeightedFile]:
    """Each of ``loras`` at the weights of its choice.

    Raises:
        CompatibilityError: weights of blocks that are for another family.
    """
    found = []
    for choice, lora in zip(choices, loras, strict=True):
        try:
            factors = None if choice.blocks is None else block_factors(choice.blocks, modules.shapes, modules.family)
        except CompatibilityError as error:
            raise CompatibilityError(f"{choice.file}: {error}") from None
        found.append(WeightedFile(choice=choice, lora=lora, factors=factors))
    return found


def read_named(paths: list[Path], base: str | None) -> tuple[Modules, list[NamedLora]]:
    """Read LoRA files of one family, and the modules that they name.

    Raises:
        LoraFileError, BaseModelError: with one line for each file that cannot be used.
    """
    files, problems = [], []
    for path in paths:
        try:
            files.append(read_lora(path))
        except LoraFileError as error:
            problems += error.problems
    if problems:
        raise LoraFileError(problems)
    # A file may leave its family open; another of them shows it.
    modules = Modules.of(next((file for file in files if file.family is not None), files[0]), base)
    named = []
    for file in files:
        try:
            named.append(modules.named(file))
        except LoraFileError as error:
            problems += error.problems
    if problems:
        raise LoraFileError(problems)
    return modules, named


def pristine_weight(base: BaseCheckpoint, name: str) -> Tensor:
    """The weight of the module with this canonical name, float32 on the CPU, read from the checkpoint's file."""
    part, _, path = name.partition(".")
    wanted = {name: base.parts[part].tensors[f"{path}.weight"]}
    return read_tensors(wanted, dtype=torch.float32, device=torch.device("cpu"))[name]


def check_new_lora(target: Path) -> None:
    """Find out whether ``target`` can be written as a new LoRA file.

    Raises:
        LoraFileError: it exists, or does not end in .safetensors; TargetError: its place cannot be written to.
    """
    if target.suffix != ".safetensors":
        raise LoraFileError(f"{target}: the name of the file to write must end in .safetensors")
    if target.exists():
        raise LoraFileError(f"{target}: exists already; choose another name")
    check_target(target)


def output_dtype(precision: str, files: Sequence[LoraFile]) -> torch.dtype:
    """The dtype of a file to write: ``precision``, or with ``auto`` the narrowest that holds all numbers of ``files``.

    Eight bits become float16: what was computed needs more, and few programs read them.
    """
    if precision != "auto":
        return getattr(torch, precision)
    dtypes = [getattr(torch, name) for file in files for name in file.dtype.split(", ")]
    return reduce(torch.promote_types, [torch.float16 if dtype.itemsize == 1 else dtype for dtype in dtypes])
