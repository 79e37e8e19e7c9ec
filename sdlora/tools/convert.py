"""A LoRA file in one format -> the same LoRA in another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraFileError
from ..formats.lora_file import read_lora
from ..formats.lora_writer import WRITTEN_FORMATS, write_lora
from ..formats.metadata import with_family
from ..formats.readers import read_by
from ..progress import Progress, progress_or_bar
from .named_lora import Modules, check_new_lora, output_dtype

_OF_ONE_FORMAT = ("lora_adapter_metadata", "format")
"""Metadata that describes the names of the source's tensors."""


_KEYS = {"source_format": "source_dialect", "format": "dialect"}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted."""

    output: str
    family: str
    modules: int
    source_format: str
    format: str
    dtype: str
    read_by: str
    """Which programs read the format."""
    left_out: tuple[str, ...]
    """What the source holds and cannot be used, as sentences."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names, except that the formats have other keys, which programs know."""
        return {_KEYS.get(name, name): value for name, value in asdict(self).items()}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    base: str | None = None,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Conversion:
    """Write the LoRA in ``source`` to the new file ``target`` in the format ``to``.

    Args:
        to: ``kohya``, ``diffusers`` or ``peft``.
        base: whose module names are used; by default those of the published checkpoints of the file's family.
        precision: ``float16``, ``bfloat16`` or ``float32``; ``auto`` is that of the source.
        progress: a bar on standard error by default.

    Raises:
        LoraFileError, BaseModelError: the source cannot be read, its family is unknown, one of its modules has no name in
            the base or cannot be written in this format, or the target exists. Nothing is written then.
    """
    source, target = Path(source), Path(target)
    if to not in WRITTEN_FORMATS:
        raise LoraFileError(f"format {to!r} cannot be written; choose one of {', '.join(WRITTEN_FORMATS)}")
    check_new_lora(target)
    with progress_or_bar(progress) as shown:
        shown.start("Converting", 2)
        lora = read_lora(source)
        shown.advance()
        known = Modules.of(lora, base)
        named = known.named(lora)
        dtype = output_dtype(precision, [lora])
        metadata = {key: value for key, value in lora.metadata.items() if key not in _OF_ONE_FORMAT}
        write_lora(
            target,
            named.changes,
            with_family(metadata, known.family),
            dtype=dtype,
            format=to,
            family=known.family,
            base_modules=known.shapes,
            bundled=lora.bundled if to == "kohya" else None,
        )
        shown.advance()
    lost = [f"embedding {name}: only kohya's format can bundle one" for name in lora.embeddings if to != "kohya"]
    return Conversion(
        output=str(target),
        family=known.family.name,
        modules=len(named.changes),
        source_format=lora.format,
        format=to,
        dtype=str(dtype).removeprefix("torch."),
        read_by=read_by(to),
        left_out=(*lora.problems, *lost),
    )
