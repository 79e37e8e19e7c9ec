"""One canonical name for every module, and its spellings in LoRA files.

Canonical is ``<part>.<path>``: the part is ``unet``, ``text_encoder`` or ``text_encoder_2``, the path is the one in
diffusers and in transformers before 5.6 (``text_model.encoder.layers.0.self_attn.q_proj``). Spellings are inverted
from the names of the base's modules, never by cutting strings, so an underscore is never mistaken for a dot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraFileError
from ..families import LORA_PARTS, Family
from .checkpoint_keys import unet_table_to_ldm

_KOHYA_PREFIXES = {
    "unet": ("lora_unet", "lycoris", "oft_unet"),
    "text_encoder": ("lora_te", "lora_te1", "lycoris", "oft_te", "oft_te1"),
    "text_encoder_2": ("lora_te2", "oft_te2"),
}
"""In front of a flattened path; kohya's for a single text encoder first, then those of SimpleTuner and of kohya's OFT."""
_COMFYUI_PREFIXES = {
    "unet": ("diffusion_model",),
    "text_encoder": ("text_encoders.clip_l.transformer", "text_encoders.clip_h.transformer"),
    "text_encoder_2": ("text_encoders.clip_g.transformer",),
}
_STARTS = {
    part: (
        # That of SimpleTuner is in front of every part.
        *(f"{prefix}_" for prefix in _KOHYA_PREFIXES[part] if prefix != "lycoris"),
        *(f"{prefix}." for prefix in _COMFYUI_PREFIXES[part]),
    )
    for part in LORA_PARTS
}
"""Part -> how keys begin that are of it; no beginning of one part begins with one of another."""
NESTING = "text_model."
"""In front of a text encoder's layers, except in transformers from 5.6."""


def kohya_keys(names: Iterable[str], family: Family, base_modules: Collection[str]) -> dict[str, str]:
    """Canonical name -> key, as kohya's trainer writes it for the family.

    ``base_modules`` are the canonical names of the base that the modules belong to, by which a UNet's blocks are counted
    where kohya uses sgm's names.

    Raises:
        ValueError: a module that has no sgm name in that base.
    """
    sgm = _sgm_names(base_modules) if family.kohya_unet_names == "sgm" else {}
    keys = {}
    for name in names:
        part, _, path = name.partition(".")
        if part == "unet" and family.kohya_unet_names == "sgm":
            if name not in sgm:
                raise ValueError(f"{name} is not a module of the base")
            path = sgm[name]
        several = part == "text_encoder" and len(family.text_encoders) > 1
        prefix = _KOHYA_PREFIXES[part][1 if several else 0]
        keys[name] = f"{prefix}_{path.replace('.', '_')}"
    return keys


def _sgm_names(names: Iterable[str]) -> dict[str, str]:
    """Canonical name -> LDM path, of the UNet's modules among ``names``."""
    paths = {name.removeprefix("unet.") for name in names if name.startswith("unet.")}
    return {f"unet.{ours}": stored.name for ours, stored in unet_table_to_ldm(paths).items()}


def part_of(key: str) -> str | None:
    """The part that a key in any spelling belongs to, by its prefix; None for an unknown prefix."""
    key = key.removeprefix("base_model.model.")
    for part, starts in _STARTS.items():
        if key.startswith(starts):
            return part
    head = key.partition(".")[0]
    if head in LORA_PARTS:
        return head
    bare = key.removeprefix("lycoris_")
    if bare.startswith(("down_blocks", "up_blocks", "mid_block", "input_blocks", "middle_block", "output_blocks")):
        return "unet"
    return "text_encoder" if bare.startswith(("text_model", "encoder")) else None


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """``matched`` maps keys to canonical names; ``unmatched`` are keys that name no module of the base."""

    matched: Mapping[str, str]
    unmatched: tuple[str, ...]

    def check(self, file: Path) -> None:
        """Raises ``LoraFileError``, which names ``file``, where two keys name the same module: programs differ in which
        of them they take."""
        first: dict[str, str] = {}
        for key, name in self.matched.items():
            if (other := first.setdefault(name, key)) != key:
                raise LoraFileError(f"{file}: {other} and {key} are the same module; remove one of them from the file")


def resolve(keys: Iterable[str], names: Iterable[str]) -> Resolution:
    """Match keys in any known spelling against the canonical ``names`` of a base's modules.

    Raises:
        ValueError: two modules of the base share a spelling (a fault of the base's names, not of a file).
    """
    names, table = tuple(names), dict[str, str]()
    sgm = _sgm_names(names)
    for name in names:
        for spelling in _spellings(name, sgm.get(name)):
            if table.setdefault(spelling, name) != name:
                raise ValueError(f"{name} and {table[spelling]} are both spelled {spelling}")
    matched, unmatched = {}, []
    for key in keys:
        name = table.get(key)
        if name is None:
            unmatched.append(key)
        else:
            matched[key] = name
    return Resolution(matched=matched, unmatched=tuple(unmatched))


def _spellings(name: str, sgm: str | None) -> set[str]:
    part, _, path = name.partition(".")
    paths = {path} if sgm is None else {path, sgm}
    if part != "unet":
        paths.add(path.removeprefix(NESTING))
    flat = {p.replace(".", "_") for p in paths}
    dotted = {f"{part}.{p}" for p in paths} | {f"{prefix}.{p}" for prefix in _COMFYUI_PREFIXES[part] for p in paths}
    if part != "text_encoder_2":
        # PEFT's folder of one model names no part.
        dotted |= paths
    if part == "unet":
        head, dot, projection = path.removesuffix(".0").rpartition(".attn1.")
        if not dot:
            head, dot, projection = path.removesuffix(".0").rpartition(".attn2.")
        if dot:
            # Diffusers' oldest spelling.
            dotted |= {f"{prefix}{head}{dot}processor.{projection}" for prefix in ("", "unet.")}
    return {f"{prefix}_{p}" for prefix in _KOHYA_PREFIXES[part] for p in flat} | dotted
