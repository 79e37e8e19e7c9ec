"""The family that a LoRA was made for, recognised from its keys, the shapes of its changes, and its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..families import FAMILIES, SDXL, Family, family_of_text_width, family_of_unet
from .keys import part_of

if TYPE_CHECKING:
    from ..lora.change import Change

_FIRST_LEVEL = r"(down_blocks_0_attentions|input_blocks_[12]_1_)"
"""Attention on the first level, which SDXL alone lacks."""
_SGM_BLOCKS = r"(input|output)_blocks_"
_SECOND_LAYER = r"transformer_blocks_1_"
"""More than one transformer layer in an attention, which SDXL alone has."""


def detect_family(modules: Mapping[str, Change], metadata: Mapping[str, str]) -> Family | None:
    """The family of a LoRA, whose ``modules`` are keyed as a file spells them; None where nothing shows it.

    Names and shapes decide; metadata, which may be wrong, is used where they leave it open.
    """
    return family_of_shapes({key: change.weight_shape for key, change in modules.items()}) or stated_family(metadata)


def family_of_shapes(modules: Mapping[str, tuple[int, ...] | None]) -> Family | None:
    """``detect_family`` by names and shapes alone: module -> shape of the weight that it changes, None where unknown."""
    if any(part_of(key) == "text_encoder_2" for key in modules):
        return SDXL
    shapes = {key.replace(".", "_"): shape for key, shape in modules.items()}
    return _by_blocks(shapes) or _by_shapes(shapes)


def stated_family(metadata: Mapping[str, str]) -> Family | None:
    """The family that ``ss_base_model_version`` or ``modelspec.architecture`` of a LoRA states; None if neither does."""
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    for family in FAMILIES.values():
        # What follows ``sdxl`` in ``sdxl_base_v1-0`` is the release; any of them is the family.
        if version.startswith(family.kohya_version.partition("_base")[0]):
            return family
    return next((f for f in FAMILIES.values() if architecture == f.modelspec_architecture), None)


def _by_blocks(shapes: Mapping[str, tuple[int, ...] | None]) -> Family | None:
    if _any_has(shapes, _SECOND_LAYER):
        return SDXL
    return SDXL if _any_has(shapes, _SGM_BLOCKS) and not _any_has(shapes, _FIRST_LEVEL) else None


def _by_shapes(shapes: Mapping[str, tuple[int, ...] | None]) -> Family | None:
    widths = {shape[1] for key, shape in shapes.items() if shape and re.search(r"attn2_to_[kv]$", key)}
    if len(widths) == 1 and (family := family_of_text_width(widths.pop())):
        return family
    projections = {key: shape for key, shape in shapes.items() if key.endswith("_proj_in")}
    if any(len(shape) == 4 for shape in projections.values() if shape):
        return family_of_unet(linear_projection=False, size_conditioning=False)
    if projections and _any_has(shapes, _FIRST_LEVEL):
        return family_of_unet(linear_projection=True, size_conditioning=False)
    return None


def _any_has(keys: Iterable[str], pattern: str) -> bool:
    return any(re.search(pattern, key) for key in keys)
