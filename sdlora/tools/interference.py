"""How far several LoRAs are in each other's way."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from ..errors import LoraFileError
from ..generation.arguments import LoraArgument, constant_choices
from ..lora.combining import Spectrum, overlap, plain
from ..progress import Progress, progress_or_bar
from .measuring import cosine, grouped, part_of, without_nan
from .named_lora import Modules, WeightedFile, read_named, weighted_files


@dataclass(frozen=True, kw_only=True)
class PairInBlock:
    """Two LoRAs, each at its weight, in one block of the base, over the modules that both change."""

    files: tuple[str, str]
    block: str
    modules: int
    cosine: float
    """Cosine of their changes: 1 for the same direction, -1 for the reverse, 0 for a right angle; NaN where one is zero."""
    outputs: float
    """Mean share of the smaller subspace of outputs that lies in the larger, from 0 to 1."""
    inputs: float
    """The same for the inputs that they read."""


@dataclass(frozen=True, kw_only=True)
class Interference:
    """How far several LoRAs are in each other's way."""

    pairs: tuple[PairInBlock, ...]
    growth: Mapping[str, float]
    """Block -> norm of the sum of all changes over that of as many changes at right angles. Above 1 they add up."""
    weights: Mapping[str, tuple[float, float]]
    """File -> suggested weights of UNet and text encoder: those given, divided by the growth of the part where it is above
    1, so that the sum moves the base no more than changes at right angles would."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names; a cosine that is not defined is null."""
        return without_nan(asdict(self))


def interference(
    loras: LoraArgument | Sequence[LoraArgument], *, base: str | None = None, progress: Progress | None = None
) -> Interference:
    """Measure the overlap of several LoRAs in each block, for ``FILE[:UNET[:TE]]`` each.

    Raises:
        LoraFileError, BaseModelError: fewer than two files, or one that cannot be used.
    """
    choices = constant_choices(loras)
    if len(choices) < 2:
        raise LoraFileError("name at least two LoRA files")
    with progress_or_bar(progress) as shown:
        modules, named = read_named([choice.file for choice in choices], base)
        sources = weighted_files(modules, choices, named)
        names = sorted({name for lora in named for name in lora.changes if len(modules.shapes[name]) > 1})
        shown.start("Comparing", len(names))
        measured = {}
        for name in names:
            measured[name] = _measure(name, sources, modules)
            shown.advance()
    blocks = grouped(measured, _block_of)
    parts = grouped(measured, lambda name: "unet" if name.startswith("unet.") else "text_encoder")
    factors = {part: 1 / max(1.0, _growth(found)) for part, found in parts.items()}
    return Interference(
        pairs=tuple(
            pair
            for block, found in blocks.items()
            for i, j in combinations(range(len(sources)), 2)
            if (pair := _pair(block, found, i, j, sources)) is not None
        ),
        growth={block: _growth(found) for block, found in blocks.items()},
        weights={
            str(choice.file): (
                choice.unet * factors.get("unet", 1.0),
                choice.text_encoder * factors.get("text_encoder", 1.0),
            )
            for choice in choices
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One module: products of the changes at their weights, and the overlaps of each pair, by the numbers of the files."""

    products: Mapping[tuple[int, int], float]
    outputs: Mapping[tuple[int, int], float]
    inputs: Mapping[tuple[int, int], float]


def _measure(name: str, sources: Sequence[WeightedFile], modules: Modules) -> _Measured:
    spectra = {
        number: _spectrum(name, source, modules) for number, source in enumerate(sources) if name in source.lora.changes
    }
    pairs = list(combinations(spectra, 2))
    products = {(i, i): float(spectrum.values.square().sum()) for i, spectrum in spectra.items()}
    for i, j in pairs:
        one, other = spectra[i], spectra[j]
        crossed = (one.left.T @ other.left) * (one.right @ other.right.T)
        signs = math.copysign(1, sources[i].strength(name)) * math.copysign(1, sources[j].strength(name))
        products[i, j] = signs * float((crossed * one.values[:, None] * other.values).sum())
    return _Measured(
        products=products,
        outputs={(i, j): overlap(spectra[i], spectra[j], of="outputs") for i, j in pairs},
        inputs={(i, j): overlap(spectra[i], spectra[j], of="inputs") for i, j in pairs},
    )


def _spectrum(name: str, source: WeightedFile, modules: Modules) -> Spectrum:
    """That of the change at the size of its weight, whose sign is left to the products."""
    change, strength = source.lora.changes[name], abs(source.strength(name))
    low_rank = plain(change)
    if low_rank is not None:
        return Spectrum.of_product([(low_rank, strength)], modules.shapes[name])
    weight = modules.weight(name, {str(source.choice.file): change}).double()
    return Spectrum.of_matrix(strength * change.delta(weight))


def _pair(
    block: str, found: Sequence[_Measured], i: int, j: int, sources: Sequence[WeightedFile]
) -> PairInBlock | None:
    both = [each for each in found if (i, j) in each.products]
    if not both:
        return None
    product, first, second = (math.fsum(each.products[key] for each in both) for key in ((i, j), (i, i), (j, j)))
    return PairInBlock(
        files=(sources[i].choice.name, sources[j].choice.name),
        block=block,
        modules=len(both),
        cosine=cosine(product, first, second),
        outputs=sum(each.outputs[i, j] for each in both) / len(both),
        inputs=sum(each.inputs[i, j] for each in both) / len(both),
    )


def _growth(found: Sequence[_Measured]) -> float:
    alone = math.fsum(value for each in found for (i, j), value in each.products.items() if i == j)
    crossed = math.fsum(value for each in found for (i, j), value in each.products.items() if i != j)
    return math.sqrt(max(0.0, alone + 2 * crossed) / alone) if alone > 0 else 1.0


def _block_of(name: str) -> str:
    """``unet.down_blocks.1``, ``unet.mid_block``, a text encoder, or ``unet`` for what is outside the blocks."""
    match = re.match(r"unet\.((down|up)_blocks\.\d+|mid_block)", name)
    return match[0] if match else part_of(name)
