"""One canonical name for every module, and its spellings in LoRA files.

Canonical is ``<part>.<path>``: the part is ``unet``, ``text_encoder`` or ``text_encoder_2``, the path is the module's own
in diffusers and in transformers before 5.6 (``text_model.encoder.layers.0.self_attn.q_proj``). Spellings are inverted
from the names of the base's own modules, never by cutting strings, so an underscore is never mistaken for a dot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PARTS = ("unet", "text_encoder", "text_encoder_2")

_KOHYA_PREFIXES = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
_NESTING = "text_model."


def kohya_key(name: str, *, two_text_encoders: bool) -> str:
    """``unet.mid_block.…to_q`` -> ``lora_unet_mid_block_…to_q``, as kohya's own trainer writes it for SD 1.x and 2.x."""
    part, _, path = name.partition(".")
    prefixes = _KOHYA_PREFIXES[part]
    prefix = prefixes[-1] if two_text_encoders else prefixes[0]
    return f"{prefix}_{path.replace('.', '_')}"


def part_of(key: str) -> str | None:
    """The part that a key in any spelling belongs to, by its prefix; None where it has no known prefix."""
    for part, prefixes in _KOHYA_PREFIXES.items():
        if any(key.startswith(f"{prefix}_") for prefix in prefixes):
            return part
    head = key.removeprefix("base_model.model.").partition(".")[0]
    return head if head in PARTS else None


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """``matched`` maps keys to canonical names; ``unmatched`` are keys that name no module of the base."""

    matched: Mapping[str, str]
    unmatched: tuple[str, ...]


def resolve(keys: Iterable[str], names: Iterable[str]) -> Resolution:
    """Match keys in any known spelling against the canonical ``names`` of a base's modules.

    Raises:
        ValueError: two modules of the base share a spelling (a fault of the base's names, not of a file).
    """
    table: dict[str, str] = {}
    for name in names:
        for spelling in _spellings(name):
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


def _spellings(name: str) -> set[str]:
    part, _, path = name.partition(".")
    paths = {path}
    if part != "unet":
        paths.add(path.removeprefix(_NESTING))
    flat = {p.replace(".", "_") for p in paths}
    dotted = {f"{part}.{p}" for p in paths}
    return {f"{prefix}_{p}" for prefix in _KOHYA_PREFIXES[part] for p in flat} | dotted
