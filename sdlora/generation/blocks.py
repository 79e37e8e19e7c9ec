"""Weights of the UNet's blocks, in the notation of the extension lora-block-weight of A1111."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import CompatibilityError, LoraFileError
from ..families import Family
from ..formats.checkpoint_keys import unet_table_to_ldm

BASE = "BASE"
"""The text encoders, and what of the UNet is outside its blocks."""


def _blocks(inputs: Iterable[int], outputs: Iterable[int]) -> tuple[str, ...]:
    return (BASE, *(f"IN{n:02}" for n in inputs), "M00", *(f"OUT{n:02}" for n in outputs))


_SD_ATTENTION = _blocks((1, 2, 4, 5, 7, 8), range(3, 12))
_SDXL_ATTENTION = _blocks((4, 5, 7, 8), range(6))
LISTS = {
    17: _SD_ATTENTION,
    26: _blocks(range(12), range(12)),
    12: _SDXL_ATTENTION,
    20: _blocks(range(9), range(9)),
}
"""Length of a list -> the blocks that its numbers are for: those with attention, or all, of SD 1.x and 2.x, and of SDXL."""
_SHALLOW = {
    _SD_ATTENTION: {"IN01", "IN02", "IN04", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"},
    _SDXL_ATTENTION: {"IN04", "IN05", "OUT03", "OUT04", "OUT05"},
}
"""Blocks with attention near the ends of the UNet; the others are deep."""
PRESETS = ("ALL", "NONE", "ALL0.5", "INS", "IND", "INALL", "MIDD", "OUTD", "OUTS", "OUTALL")


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """A preset of the extension, or a list of 12, 17, 20 or 26 numbers, as ``text`` has it."""

    text: str

    def of(self, family: Family) -> dict[str, float]:
        """Block -> what the weight is multiplied by; a block that is not named has 0, as in the extension.

        Raises:
            CompatibilityError: a list for another family; the message is the end of a sentence.
        """
        is_sdxl = family.unet.size_conditioning
        if self.text in PRESETS:
            return _preset(self.text, is_sdxl=is_sdxl)
        numbers = [float(number) for number in self.text.split(",")]
        fitting = (12, 20) if is_sdxl else (17, 26)
        if len(numbers) not in fitting:
            raise CompatibilityError(
                f"lbw={self.text}: has {len(numbers)} numbers; {family.title} has {fitting[0]} blocks with attention, and "
                f"{fitting[1]} in all"
            )
        return dict(zip(LISTS[len(numbers)], numbers, strict=True))


def parse_blocks(text: str, source: str) -> BlockWeights:
    """Read the value of ``lbw=``; ``source`` is named in errors.

    Raises:
        LoraFileError: neither a preset nor a list of 12, 17, 20 or 26 numbers.
    """
    if text in PRESETS:
        return BlockWeights(text=text)
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in LISTS or not all(math.isfinite(number) for number in numbers):
        raise LoraFileError(
            f"{source}: lbw={text}: expected one of {', '.join(PRESETS)}, or a list of 17 or 26 numbers (SD 1.x and 2.x), "
            "12 or 20 (SDXL)"
        )
    return BlockWeights(text=text)


def _preset(name: str, *, is_sdxl: bool) -> dict[str, float]:
    if name in ("ALL", "NONE", "ALL0.5"):
        return dict.fromkeys(LISTS[20 if is_sdxl else 26], {"ALL": 1.0, "NONE": 0.0, "ALL0.5": 0.5}[name])
    blocks = _SDXL_ATTENTION if is_sdxl else _SD_ATTENTION
    shallow = _SHALLOW[blocks]
    deep = set(blocks) - shallow - {BASE, "M00"}
    into, out = {b for b in blocks if b.startswith("IN")}, {b for b in blocks if b.startswith("OUT")}
    kept = {
        "INS": into & shallow,
        "IND": into & deep,
        "INALL": into,
        "MIDD": deep | {"M00"},
        "OUTD": out & deep,
        "OUTS": out & shallow,
        "OUTALL": out,
    }[name]
    return {block: float(block in kept | {BASE}) for block in blocks}


def block_factors(weights: BlockWeights, names: Iterable[str], family: Family) -> dict[str, float]:
    """Canonical module name of a base -> what the weight is multiplied by. Raises as ``BlockWeights.of``."""
    factors = weights.of(family)
    return {name: factors.get(block, 0.0) for name, block in blocks_of(names).items()}


def blocks_of(names: Iterable[str]) -> Mapping[str, str]:
    """Canonical module name of a base -> its block: ``BASE``, ``IN00`` to ``IN11``, ``M00``, ``OUT00`` to ``OUT11``."""
    names = tuple(names)
    paths = {name.removeprefix("unet.") for name in names if name.startswith("unet.")}
    places = {f"unet.{path}": stored.name for path, stored in unet_table_to_ldm(paths).items()}
    return {name: _block(places.get(name, "")) for name in names}


def _block(place: str) -> str:
    match = re.match(r"(input|middle|output)_blocks?\.(\d+)\.", place)
    if match is None:
        return BASE
    return "M00" if match[1] == "middle" else f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}"
