"""LoRA files with their weights, checked against a base before anything is merged."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.checkpoint import BaseCheckpoint
from ..errors import CompatibilityError, LoraFileError
from ..formats.hashes import file_hashes
from ..formats.keys import part_of, resolve
from ..formats.lora_file import LoraFile, read_lora
from ..formats.tensor_files import PICKLES
from ..lora.change import Change

logger = logging.getLogger(__name__)

_ENDINGS = "|".join(re.escape(ending) for ending in (".safetensors", *PICKLES))


@dataclass(frozen=True, kw_only=True)
class LoraChoice:
    """``FILE[:UNET[:TE]]``: a file, and the strengths of its UNet and its text-encoder parts."""

    file: Path
    unet: float = 1.0
    text_encoder: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraChoice:
        """Read ``FILE``, ``FILE:0.8`` or ``FILE:0.8:0.5``; one number holds for both parts.

        Raises:
            LoraFileError: a strength is not a number.
        """
        match = re.fullmatch(rf"(.+?(?:{_ENDINGS}))(?::([^:]*))?(?::([^:]*))?", text)
        if match is None and Path(text).is_dir():
            return cls(file=Path(text))
        if match is None:
            raise LoraFileError(
                f"{text}: expected FILE.safetensors (or .pt, .ckpt, .bin), FILE:WEIGHT or FILE:UNET:TE, or a PEFT folder"
            )
        try:
            unet = 1.0 if match[2] is None else float(match[2])
            text_encoder = unet if match[3] is None else float(match[3])
        except ValueError:
            raise LoraFileError(f"{text}: the weight behind the colon is not a number") from None
        if not all(-10 <= weight <= 10 for weight in (unet, text_encoder)):
            raise LoraFileError(f"{text}: weights go from -10 to 10")
        return cls(file=Path(match[1]), unet=unet, text_encoder=text_encoder)

    @property
    def name(self) -> str:
        return self.file.stem

    def times(self, factor: float) -> LoraChoice:
        return LoraChoice(file=self.file, unet=self.unet * factor, text_encoder=self.text_encoder * factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedLora:
    """A LoRA whose modules are named as the base names them."""

    file: LoraFile
    modules: Mapping[str, Change]
    autov3: str | None
    """Hash over its tensors, 12 digits; None of a pickle."""

    def weighted(self, choice: LoraChoice) -> dict[str, tuple[Change, float]]:
        """Canonical name -> (change, strength), as ``lora.merging.temporarily_merged`` takes it."""
        return {
            name: (module, choice.unet if name.startswith("unet.") else choice.text_encoder)
            for name, module in self.modules.items()
        }


def fit_loras(base: BaseCheckpoint, files: Sequence[Path]) -> dict[Path, FittedLora]:
    """Read every file and match it with the base's modules, by names and shapes; what is left out is logged.

    The base need not be loaded for it.

    Raises:
        LoraFileError, CompatibilityError: with one line for each file that cannot be used.
    """
    shapes = base.module_shapes()
    fitted: dict[Path, FittedLora] = {}
    faults: list[LoraFileError | CompatibilityError] = []
    for file in dict.fromkeys(files):
        try:
            fitted[file] = _fit(base, shapes, read_lora(file))
        except (LoraFileError, CompatibilityError) as error:
            faults.append(error)
    if faults:
        raise type(faults[0])([problem for fault in faults for problem in fault.problems])
    return fitted


def _fit(base: BaseCheckpoint, shapes: Mapping[str, tuple[int, ...]], file: LoraFile) -> FittedLora:
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
    misfits = [key for key, name in found.matched.items() if not file.modules[key].fits(shapes[name])]
    if misfits:
        has, wants = file.modules[misfits[0]].weight_shape, shapes[found.matched[misfits[0]]]
        sizes = f"{has} there, {wants} here" if has else f"the weight here is {wants}"
        raise CompatibilityError(
            f"{file.path}: {kind} of another size: {len(misfits)} of {total} modules do not fit the base "
            f"{base.name} (for example {misfits[0]}: {sizes})"
        )
    for problem in file.problems:
        logger.warning("%s: %s; left out", file.path, problem)
    if found.unmatched:
        parts = sorted({(part_of(key) or "unknown").replace("_", " ") for key in found.unmatched})
        logger.warning(
            "%s: %d of %d modules matched in the base %s; missing: %s (such as %s)",
            *(file.path, matched, total, base.name, ", ".join(parts), found.unmatched[0]),
        )
    return FittedLora(
        file=file,
        modules={name: file.modules[key] for key, name in found.matched.items()},
        autov3=file_hashes(file.weights).autov3,
    )
