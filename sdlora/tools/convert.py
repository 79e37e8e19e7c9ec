"""A LoRA file in one dialect -> the same LoRA in another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..base.checkpoint import find_base
from ..errors import LoraFileError
from ..formats.keys import resolve
from ..formats.lora_file import read_lora
from ..formats.lora_writer import DIALECTS, write_lora
from ..formats.metadata import with_family
from ..formats.published import published_modules


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted."""

    output: str
    family: str
    modules: int
    source_dialect: str
    dialect: str
    dtype: str
    left_out: tuple[str, ...]
    """What the source holds and cannot be used, as sentences."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: str | Path, target: str | Path, *, to: str, base: str | None = None, precision: str = "auto"
) -> Conversion:
    """Write the LoRA in ``source`` to ``target`` in the dialect ``to``.

    Args:
        base: whose module names count; by default those of the published checkpoints of the file's family.
        precision: ``auto`` is that of the source.

    Raises:
        LoraFileError, BaseModelError: the source cannot be read, its family not be told, one of its modules not be named, or
            the target is there already. Nothing is written then.
    """
    source, target = Path(source), Path(target)
    if to not in DIALECTS:
        raise LoraFileError(f"dialect {to!r} cannot be written; choose one of {', '.join(DIALECTS)}")
    if target.suffix != ".safetensors":
        raise LoraFileError(f"{target}: the name of the file to write ends in .safetensors")
    if target.exists():
        raise LoraFileError(f"{target}: exists already; choose another name")
    lora = read_lora(source)
    checkpoint = find_base(base) if base else None
    family = checkpoint.family if checkpoint else lora.family
    if family is None:
        raise LoraFileError(
            f"{source}: its family cannot be told from names, shapes or metadata; name its base with --base"
        )
    names = checkpoint.module_shapes() if checkpoint else published_modules(family.name)
    found = resolve(lora.modules, names)
    if found.unmatched:
        raise LoraFileError(
            f"{source}: {len(found.unmatched)} of {len(lora.modules)} modules are not in {family.title}, such as "
            f"{found.unmatched[0]}; name the base that it was made for with --base"
        )
    dtype = getattr(torch, lora.dtype.split(", ")[-1] if precision == "auto" else precision)
    modules = {name: lora.modules[key] for key, name in found.matched.items()}
    own = {key: value for key, value in lora.metadata.items() if key not in ("lora_adapter_metadata", "format")}
    write_lora(
        target,
        modules,
        with_family(own, family),
        dtype=dtype,
        dialect=to,
        family=family,
        base_modules=names,
        bundled=lora.bundled if to == "kohya" else None,
    )
    lost = [f"embedding {name}: only kohya's dialect can bundle one" for name in lora.embeddings if to != "kohya"]
    return Conversion(
        output=str(target),
        family=family.name,
        modules=len(modules),
        source_dialect=lora.dialect,
        dialect=to,
        dtype=str(dtype).removeprefix("torch."),
        left_out=(*lora.problems, *lost),
    )
