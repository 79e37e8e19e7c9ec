"""A base's tensors as one LDM or sgm file holds them: the inverse of what loading does to the names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdlora.families import Family
from sdlora.formats.checkpoint_keys import Stored, Table, clip_table_to_open_clip, unet_table_to_ldm, vae_table_to_ldm

_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}


def ldm_tensors(parts: Mapping[str, Mapping[str, Tensor]], family: Family) -> dict[str, Tensor]:
    """Part -> our name -> tensor, as one table under LDM's names.

    Raises:
        ValueError: a tensor that LDM has no name for; the text names it.
    """
    result: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        prefix, table = _table(part, tensors, family)
        if missing := sorted(tensors.keys() - table.keys()):
            raise ValueError(f"{part}.{missing[0]} has no place in a single file of {family.title}")
        fused: dict[str, dict[int, Tensor]] = {}
        for ours, stored in table.items():
            tensor = tensors[ours].T.contiguous() if stored.transposed else tensors[ours]
            if part == "vae" and ".attentions." in ours and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            fused.setdefault(prefix + stored.name, {})[stored.third or 0] = tensor
        for name, thirds in fused.items():
            result[name] = thirds[0] if len(thirds) == 1 else torch.cat([thirds[third] for third in sorted(thirds)])
    return result


def _table(part: str, names: Mapping[str, Tensor], family: Family) -> tuple[str, Table]:
    if part == "unet":
        return _PREFIXES[part], unet_table_to_ldm(names.keys())
    if part == "vae":
        return _PREFIXES[part], vae_table_to_ldm(names.keys())
    facts = next(encoder for encoder in family.text_encoders if encoder.part == part)
    if facts.spelling == "open_clip":
        return facts.prefixes[0], clip_table_to_open_clip(names.keys())
    return facts.prefixes[0], {name: Stored(name=name) for name in names}
