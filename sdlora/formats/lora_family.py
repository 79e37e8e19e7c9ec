"""The family that a LoRA was made for, recognised from its keys, the shapes of its changes, and its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
_READS_TEXT = ("attn2_to_k", "attn2_to_v")
"""Ends of the names of modules that are as wide as text embeddings."""
_PROJECTION = "_proj_in"
"""End of the name of the first layer of an attention, which is a convolution or a linear layer."""


def detect_family(modules: Mapping[str, Change], metadata: Mapping[str, str]) -> Family | None:
    """The family of a LoRA, whose ``modules`` are keyed as a file spells them; None where nothing shows it.

    Names and shapes decide; metadata, which may be wrong, is used where they leave it open.
    """
    return family_of_shapes({key: change.weight_shape for key, change in modules.items()}) or stated_family(metadata)


def family_of_shapes(modules: Mapping[str, tuple[int, ...] | None]) -> Family | None:
    """``detect_family`` by names and shapes alone: module -> shape of the weight that it changes, None where unknown."""
    return family_of(marks_of(modules), modules)


@dataclass(frozen=True, kw_only=True)
class FamilyMarks:
    """What the names of a LoRA's modules show of its family."""

    family: Family | None
    """That which names alone show."""
    deciding: tuple[str, ...]
    """Modules by the shapes of whose weights the family is known else."""
    has_first_level: bool


def marks_of(modules: Iterable[str]) -> FamilyMarks:
    """The marks of ``modules``, as a file spells them."""
    modules = tuple(modules)
    spelled = {key: key.replace(".", "_") for key in modules}
    text = "\n".join(spelled.values())
    has_first_level = re.search(_FIRST_LEVEL, text) is not None
    is_sdxl = (
        any(part_of(key) == "text_encoder_2" for key in modules)
        or re.search(_SECOND_LAYER, text) is not None
        or (re.search(_SGM_BLOCKS, text) is not None and not has_first_level)
    )
    return FamilyMarks(
        family=SDXL if is_sdxl else None,
        deciding=tuple(key for key, name in spelled.items() if name.endswith((*_READS_TEXT, _PROJECTION))),
        has_first_level=has_first_level,
    )


def family_of(marks: FamilyMarks, shapes: Mapping[str, tuple[int, ...] | None]) -> Family | None:
    """``family_of_shapes`` of modules with ``marks``, where ``shapes`` has the deciding ones."""
    if marks.family is not None:
        return marks.family
    spelled = {key.replace(".", "_"): shapes[key] for key in marks.deciding}
    widths = {shape[1] for key, shape in spelled.items() if shape and key.endswith(_READS_TEXT)}
    if len(widths) == 1 and (family := family_of_text_width(widths.pop())):
        return family
    projections = {key: shape for key, shape in spelled.items() if key.endswith(_PROJECTION)}
    if any(len(shape) == 4 for shape in projections.values() if shape):
        return family_of_unet(linear_projection=False, size_conditioning=False)
    if projections and marks.has_first_level:
        return family_of_unet(linear_projection=True, size_conditioning=False)
    return None


def stated_family(metadata: Mapping[str, str]) -> Family | None:
    """The family that ``ss_base_model_version`` or ``modelspec.architecture`` of a LoRA states; None if neither does."""
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    for family in FAMILIES.values():
        # What follows ``sdxl`` in ``sdxl_base_v1-0`` is the release; any of them is the family.
        if version.startswith(family.kohya_version.partition("_base")[0]):
            return family
    return next((f for f in FAMILIES.values() if architecture == f.modelspec_architecture), None)
