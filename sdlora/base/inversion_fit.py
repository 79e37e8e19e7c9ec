"""Which text encoder of a base gets which vectors of a textual inversion."""

from __future__ import annotations

from torch import Tensor

from ..formats.inversion_file import Inversion
from .checkpoint import BaseCheckpoint

_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""Part -> what files call its vectors."""


def vectors_by_part(inversion: Inversion, base: BaseCheckpoint) -> dict[str, Tensor]:
    """Part of ``base`` -> its vectors, (n, width). Those for a text encoder that ``base`` lacks are left out."""
    parts = [facts.part for facts in base.family.text_encoders]
    if len(parts) == 1 and len(inversion.vectors) == 1:
        return dict(zip(parts, inversion.vectors.values(), strict=True))
    return {part: inversion.vectors[_ENCODERS[part]] for part in parts if _ENCODERS[part] in inversion.vectors}


def misfit(inversion: Inversion, base: BaseCheckpoint) -> str | None:
    """Why ``inversion`` does not fit ``base``, as a line for the user; None where it does."""
    name = "text_model.embeddings.token_embedding.weight"
    widths = {facts.part: base.parts[facts.part].shapes()[name][1] for facts in base.family.text_encoders}
    found = vectors_by_part(inversion, base)
    if len(found) == len(inversion.vectors) and all(found[part].shape[1] == widths[part] for part in found):
        return None
    of_file = " and ".join(str(tensor.shape[1]) for tensor in inversion.vectors.values())
    of_base, title = " and ".join(map(str, widths.values())), base.family.title
    return (
        f"{inversion.path}: a textual inversion with vectors of {of_file} numbers; those of the base {base.name} have "
        f"{of_base}: use one that was made for {title}"
    )
