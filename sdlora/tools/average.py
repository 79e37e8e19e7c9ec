"""LoRA files that one run wrote on its way -> one with the mean of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraFileError
from ..formats.lora_writer import write_lora
from ..formats.metadata import with_family
from ..lora.change import Change
from ..progress import Progress, progress_or_bar
from .named_lora import NamedLora, check_new_lora, output_dtype, read_named


@dataclass(frozen=True, kw_only=True)
class Average:
    """What was averaged."""

    output: str
    files: int
    modules: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)


def average(
    sources: Sequence[str | Path],
    target: str | Path,
    *,
    base: str | None = None,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Average:
    """Write the mean of files of one run, tensor by tensor (stochastic weight averaging, Izmailov et al. 2018).

    Tensors of different runs do not belong together, since each run has matrices of its own: those are for ``merge``.

    Raises:
        LoraFileError: fewer than two files, files of different runs or of other kinds, ranks or alphas, or a target that
            exists. Nothing is written then.
    """
    target, paths = Path(target), [Path(source) for source in sources]
    check_new_lora(target)
    if len(paths) < 2:
        raise LoraFileError("name at least two LoRA files of one run")
    with progress_or_bar(progress) as shown:
        modules, named = read_named(paths, base)
        _check_one_run(named)
        dtype = output_dtype(precision, [lora.file for lora in named])
        shown.start("Averaging", len(named[0].changes))
        averaged: dict[str, Change] = {}
        for name in sorted(named[0].changes):
            averaged[name] = _mean(name, [lora.changes[name] for lora in named], dtype)
            shown.advance()
        metadata = with_family(named[-1].file.metadata, modules.family)
        write_lora(
            target,
            averaged,
            metadata | {"sdlora_average": f"{len(named)} files"},
            dtype=dtype,
            family=modules.family,
            base_modules=modules.shapes,
            bundled=named[-1].file.bundled,
        )
    dtype_name = str(dtype).removeprefix("torch.")
    return Average(output=str(target), files=len(named), modules=len(averaged), dtype=dtype_name)


def _check_one_run(named: Sequence[NamedLora]) -> None:
    first, *others = named
    problems = []
    for lora in others:
        stated = {key.file.metadata.get("ss_session_id") for key in (first, lora)} - {None}
        if len(stated) > 1:
            problems.append(
                f"{lora.file.path}: of another run than {first.file.path}; use sdlora merge --method linear"
            )
        elif lora.changes.keys() != first.changes.keys():
            problems.append(f"{lora.file.path}: has other modules than {first.file.path}")
    if problems:
        raise LoraFileError(problems)


def _mean(name: str, changes: Sequence[Change], dtype: torch.dtype) -> Change:
    """The mean of every tensor in ``dtype``; everything else must be the same."""
    first, values = changes[0], dict[str, Any]()
    for field in fields(first):  # ty: ignore[invalid-argument-type]
        found: list[Any] = [getattr(change, field.name, None) for change in changes]
        tensors = [each for each in found if isinstance(each, Tensor)]
        inner = [each for each in found if isinstance(each, Change)]
        if len(inner) == len(found):
            values[field.name] = _mean(name, inner, dtype)
        elif len(tensors) == len(found) and len({each.shape for each in tensors}) == 1:
            values[field.name] = torch.stack([each.double() for each in tensors]).mean(0).to(dtype)
        elif tensors or inner or any(each != found[0] for each in found):
            raise LoraFileError(f"{name}: its kind, rank or alpha is not the same in all files; use sdlora merge")
    return replace(first, **values)  # ty: ignore[invalid-argument-type]
