"""How LoRA files name their tensors: which belong to a module, and which program's format they show. Without torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

PEFT_WEIGHTS = "adapter_model.safetensors"
"""Name of the file with the tensors in the folder of a PEFT adapter."""
BUNDLED = "bundle_emb."
"""How the names of tensors begin that are textual inversions, which a LoRA file brings along."""
_LORA_TENSOR = (
    r"(^|[._])(lora_(down|up|mid|A|B|linear_layer)|lora\.(down|up)|hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_(blocks|diag))(\.|$)"
    r"|^(lora|lycoris|oft)_(unet|te)"
)
_SUFFIXES = {
    # kohya and LyCORIS; PEFT; diffusers now, before, and at first
    **{f".{matrix}.weight": "down" for matrix in ("lora_down", "lora_A", "lora_A.default", "lora.down")},
    **{f".{matrix}.weight": "up" for matrix in ("lora_up", "lora_B", "lora_B.default", "lora.up")},
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude_vector",
    ".lora_magnitude_vector.weight": "magnitude_vector",
    ".lora_magnitude_vector.default.weight": "magnitude_vector",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".on_input": "on_input",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
    **{f".{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
    ".oft_blocks": "oft_blocks",
    ".oft_diag": "oft_diag",
    ".rescale": "rescale",
    ".set_weight": "set_weight",
    ".reshape_weight": "reshape_weight",
}
_MOST_WORDS = 3
"""Words between dots in the longest suffix."""


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names belong to a LoRA, of whatever kind."""
    return any(re.search(_LORA_TENSOR, name) for name in names)


def group_by_module(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module as the file spells it -> role -> tensor's name; and the names that are of no known kind."""
    grouped: dict[str, dict[str, str]] = {}
    foreign, plain = [], []
    for name in names:
        suffix = _suffix_of(name)
        if suffix:
            grouped.setdefault(name.removesuffix(suffix), {})[_SUFFIXES[suffix]] = name
        else:
            (plain if name.endswith(".weight") else foreign).append(name)
    for name in plain:
        # IA³ calls its vector ``weight``, as other tensors are called; it is known by ``on_input`` beside it.
        module = grouped.get(name.removesuffix(".weight"), {})
        if "on_input" in module:
            module["vector"] = name
        else:
            foreign.append(name)
    return grouped, foreign


def _suffix_of(name: str) -> str:
    """The longest of ``_SUFFIXES`` at the end of ``name``; "" where there is none."""
    ends = name.rsplit(".", _MOST_WORDS)[1:]
    for first in range(len(ends)):
        suffix = "." + ".".join(ends[first:])
        if suffix in _SUFFIXES:
            return suffix
    return next((suffix for suffix in ("_lora.down.weight", "_lora.up.weight") if name.endswith(suffix)), "")


_FORMAT_MARKS = {
    "kohya": r"(lora|oft)_(unet|te\d?)_",
    "simpletuner": r"lycoris_",
    "comfyui": r"diffusion_model\.|text_encoders\.",
    "diffusers-processor": r".*\.processor\.",
    "peft": r".*\.lora_[AB]\.",
}
"""Format -> how the name of one of its tensors begins; the first that any name matches."""


def format_of(names: Collection[str]) -> str:
    """``LoraFile.format`` of a file with tensors of these names."""
    found = (form for form, mark in _FORMAT_MARKS.items() if any(re.match(mark, name) for name in names))
    return next(found, "diffusers")
