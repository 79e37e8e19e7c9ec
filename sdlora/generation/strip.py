"""The columns of a strip: what ``--strip`` compares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from ..errors import SdloraError
from .lora_choice import LoraChoice
from .loras import WeightedLora
from .numbers import check_counts, is_number

STRENGTHS = (0.0, 0.5, 1.0)
"""Columns of a strip by default: what the weights of each LoRA are multiplied by."""


def check_columns(choices: Sequence[LoraChoice], strengths: Sequence[float], scale: int) -> None:
    """Find out whether a strip can be made of ``choices`` at ``strengths``, enlarged ``scale`` times.

    Raises:
        SdloraError: there are no strengths, one is no number or leads to a weight out of range, or ``scale`` is below 1.
    """
    if not strengths or not all(map(is_number, strengths)):
        raise SdloraError(f"strengths {strengths!r}: expected numbers, at least one, such as {STRENGTHS}")
    check_counts(scale=scale)
    for choice, strength in product(choices, strengths):
        choice.times(strength).check(f"{choice.file} at strength {strength:g}")


def strip_columns(
    loras: tuple[WeightedLora, ...], strengths: Sequence[float]
) -> list[tuple[str, tuple[WeightedLora, ...]]]:
    """Label and LoRAs of each column of a strip."""
    columns: list[tuple[str, tuple[WeightedLora, ...]]] = [("no LoRA", ())] if 0 in strengths else []
    scaled = [lora.times(strength) for lora in loras for strength in strengths if strength]
    columns += [(f"{lora.choice.name} {lora.choice.unet:g}", (lora,)) for lora in scaled]
    if len(loras) > 1:
        columns.append(("both" if len(loras) == 2 else "all", loras))
    return columns
