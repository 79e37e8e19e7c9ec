"""How two LoRA files differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..formats.hashes import file_hashes
from ..lora.change import Change
from ..lora.combining import inner_product, plain
from ..progress import Progress, progress_or_bar
from .measuring import cosine, grouped, part_of, without_nan
from .named_lora import Modules, NamedLora, read_named


@dataclass(frozen=True, kw_only=True)
class PartDifference:
    """Two LoRAs in one part of the base, over the modules that both change."""

    part: str
    modules: int
    norms: tuple[float, float]
    """‖ΔW‖ of each, over all modules."""
    difference: float
    """‖ΔW₁ - ΔW₂‖ over the larger of the two norms; 0 where they are the same."""
    cosine: float
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); NaN where one is zero."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two LoRA files differ."""

    files: tuple[str, str]
    same_tensors: bool
    """Whether all tensors are the same, byte for byte."""
    parts: tuple[PartDifference, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Canonical names of the modules that one of them alone changes."""
    sizes: tuple[str, ...]
    """A sentence on each module whose kind, rank or alpha differs."""
    metadata: Mapping[str, tuple[str | None, str | None]]
    """Key -> both values, where they differ; None where one lacks it."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names; a cosine that is not defined is null."""
        return without_nan(asdict(self))


def diff(
    first: str | Path, second: str | Path, *, base: str | None = None, progress: Progress | None = None
) -> Difference:
    """Compare two LoRA files by what they change, whatever their formats, kinds, ranks and alphas.

    Raises:
        LoraFileError, BaseModelError: one of them cannot be used.
    """
    with progress_or_bar(progress) as shown:
        modules, named = read_named([Path(first), Path(second)], base)
        products = {}
        common = sorted(named[0].changes.keys() & named[1].changes.keys())
        shown.start("Comparing", len(common))
        for name in common:
            products[name] = _products(name, named, modules)
            shown.advance()
    left, right = (lora.changes.keys() for lora in named)
    changed = named[0].file.metadata.keys() | named[1].file.metadata.keys()
    values = {key: (named[0].file.metadata.get(key), named[1].file.metadata.get(key)) for key in sorted(changed)}
    hashes = {file_hashes(lora.file.weights).payload_sha256 for lora in named}
    return Difference(
        files=(str(first), str(second)),
        same_tensors=len(hashes) == 1 and None not in hashes,
        parts=tuple(_part(part, found) for part, found in grouped(products, part_of).items()),
        only=(tuple(sorted(left - right)), tuple(sorted(right - left))),
        sizes=tuple(line for name in common for line in _sizes(name, named)),
        metadata={key: pair for key, pair in values.items() if pair[0] != pair[1]},
    )


@dataclass(frozen=True, kw_only=True)
class _Products:
    """⟨ΔW₁, ΔW₁⟩, ⟨ΔW₂, ΔW₂⟩ and ⟨ΔW₁, ΔW₂⟩."""

    first: float
    second: float
    both: float


def _products(name: str, named: Sequence[NamedLora], modules: Modules) -> _Products:
    changes = [lora.changes[name] for lora in named]
    low = [plain(change) for change in changes]
    if low[0] is not None and low[1] is not None:
        return _Products(
            first=inner_product(low[0], low[0]),
            second=inner_product(low[1], low[1]),
            both=inner_product(low[0], low[1]),
        )
    weight = modules.weight(name, {str(lora.file.path): lora.changes[name] for lora in named}).double()
    first, second = (change.delta(weight) for change in changes)
    return _Products(
        first=float(first.square().sum()), second=float(second.square().sum()), both=float((first * second).sum())
    )


def _part(part: str, products: Sequence[_Products]) -> PartDifference:
    first, second, both = (math.fsum(getattr(each, name) for each in products) for name in ("first", "second", "both"))
    largest = max(first, second)
    apart = max(0.0, first + second - 2 * both)
    return PartDifference(
        part=part,
        modules=len(products),
        norms=(math.sqrt(first), math.sqrt(second)),
        difference=math.sqrt(apart / largest) if largest else 0.0,
        cosine=cosine(both, first, second),
    )


def _sizes(name: str, named: Sequence[NamedLora]) -> list[str]:
    first, second = (_size(lora.changes[name]) for lora in named)
    return [] if first == second else [f"{name}: {first}, {second}"]


def _size(change: Change) -> str:
    alpha = "" if change.alpha is None else f" alpha {change.alpha:g}"
    return f"{change.kind} rank {change.rank}{alpha}" if change.rank else change.kind
