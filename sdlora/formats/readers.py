"""Which of kohya's names other programs' loaders know, copied from their key maps.

Deliberately apart from ``keys.py``: what is written is held against this before a run reports success, so that a mistake
in our tables, or names that a library changes, cannot go unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..families import Family

_PROJECTIONS = r"(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2)|norm[123])"
_ATTENTION = rf"(norm|proj_in|proj_out|transformer_blocks_\d+_{_PROJECTIONS})"
_DIFFUSERS_BLOCK = (
    r"(conv_in|conv_out|conv_norm_out|time_embedding_linear_[12]|add_embedding_linear_[12]"
    rf"|(down_blocks_\d+|up_blocks_\d+|mid_block)_(attentions_\d+_{_ATTENTION}"
    r"|resnets_\d+_(norm[12]|conv[12]|time_emb_proj|conv_shortcut)|(down|up)samplers_0_conv))"
)
_SGM_BLOCK = (
    r"(time_embed_[02]|label_emb_0_[02]|out_[02]"
    rf"|(input_blocks_\d+|middle_block|output_blocks_\d+)_[012]_({_ATTENTION}"
    r"|in_layers_[02]|emb_layers_1|out_layers_[03]|skip_connection|op|conv)|input_blocks_0_0|output_blocks_\d+_\d_conv)"
)
_LAYER = r"(self_attn_(q|k|v|out)_proj|mlp_fc[12]|layer_norm[12])"
_TEXT = rf"(text_model_(encoder_layers_\d+_{_LAYER}|final_layer_norm)|text_projection)"
_ONE = rf"lora_te_{_TEXT}"
_TWO = rf"lora_te[12]_{_TEXT}"
_READERS: dict[str, dict[str, str]] = {
    "kohya": {"diffusers": rf"lora_unet_{_DIFFUSERS_BLOCK}|{_ONE}", "sgm": rf"lora_unet_{_SGM_BLOCK}|{_TWO}"},
    "ComfyUI": {
        "diffusers": rf"lora_unet_({_DIFFUSERS_BLOCK}|{_SGM_BLOCK})|lora_te1?_{_TEXT}",
        "sgm": rf"lora_unet_({_DIFFUSERS_BLOCK}|{_SGM_BLOCK})|{_TWO}",
    },
    "diffusers": {
        "diffusers": rf"lora_unet_{_DIFFUSERS_BLOCK}|lora_te1?_{_TEXT}",
        "sgm": rf"lora_unet_({_DIFFUSERS_BLOCK}|{_SGM_BLOCK})|{_TWO}",
    },
}
"""Reader -> ``Family.kohya_unet_names`` -> the keys that it knows."""


def lost_elsewhere(keys: Iterable[str], family: Family) -> dict[str, tuple[str, ...]]:
    """Reader -> the keys in kohya's format that it would leave out; readers that take all are not in it."""
    keys, lost = tuple(keys), {}
    for reader, patterns in _READERS.items():
        pattern = re.compile(patterns[family.kohya_unet_names])
        unknown = tuple(key for key in keys if not pattern.fullmatch(key))
        if unknown:
            lost[reader] = unknown
    return lost


_PEFT_READERS = (
    "read by diffusers and PEFT; ComfyUI leaves out the UNet's attention in this format; for A1111, Forge, ComfyUI and "
    "kohya's tools convert to kohya"
)
_READ_BY = {
    "kohya": "read by kohya's tools, ComfyUI, A1111, Forge, LyCORIS and diffusers",
    "diffusers": _PEFT_READERS,
    "peft": _PEFT_READERS,
}


def read_by(format: str) -> str:
    """Which programs read a written format, as a sentence without its end."""
    return _READ_BY[format]
