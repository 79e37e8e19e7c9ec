"""The columns of a strip: what ``--strip`` compares."""

from __future__ import annotations

from collections.abc import Sequence

from .loras import WeightedLora

STRENGTHS = (0.0, 0.5, 1.0)
"""Columns of a strip by default: what the weights of each LoRA are multiplied by."""


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
