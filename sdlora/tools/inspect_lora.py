"""``inspect`` of a LoRA: what the file is and does, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..families import LORA_PARTS
from ..formats.hashes import FileHashes, hash_file
from ..formats.keys import part_of
from ..formats.lora_file import LoraFile
from ..formats.metadata import stated_prediction, stated_tags, trigger_words
from ..lora.change import Change
from .inspect_report import InspectReport, LoraPart, Spread

_UNTOUCHED = {
    ("text_encoder",): "its text encoder is untouched",
    ("text_encoder", "text_encoder_2"): "both text encoders are untouched",
    ("text_encoder_2",): "its second text encoder is untouched",
    ("unet",): "its UNet is untouched",
}


def lora_report(lora: LoraFile) -> InspectReport:
    """The report on a LoRA that has been read; its file is read once more for the hashes."""
    hashes = hash_file(lora.weights, lora.payload_start)
    norms = {key: change.norm() for key, change in lora.modules.items()}
    by_part: dict[str, list[str]] = {}
    for key in lora.modules:
        by_part.setdefault(part_of(key) or "unknown", []).append(key)
    parts = {
        part: _part([lora.modules[key] for key in by_part[part]], [norms[key] for key in by_part[part]])
        for part in (*LORA_PARTS, "unknown")
        if part in by_part
    }
    silent = [part for part, keys in by_part.items() if all(norms[key] == 0 for key in keys)]
    idle = [key for part, keys in by_part.items() for key in keys if norms[key] == 0 and part not in silent]
    whole = _part(list(lora.modules.values()), list(norms.values()))
    counts = {part: parts[part].modules if part in parts else 0 for part in LORA_PARTS}
    return InspectReport(
        kind="lora",
        file=lora.path.name,
        family=lora.family.name if lora.family else None,
        format=lora.format,
        modules=counts | ({"unknown": parts["unknown"].modules} if "unknown" in parts else {}),
        kinds=lora.kinds,
        parts=parts,
        embeddings=lora.embeddings,
        rank=whole.rank,
        alpha=whole.alpha,
        scale=whole.scale,
        norm={part: found.norm for part, found in parts.items()},
        dtype=lora.dtype,
        prediction=stated_prediction(lora.metadata),
        trigger=trigger_words(lora.metadata),
        tags=stated_tags(lora.metadata),
        problems=(
            *_stale_hashes(lora.metadata, hashes),
            *_not_finite(lora),
            *(f"{part}: every change is zero; it has no effect" for part in silent),
            *lora.problems,
        ),
        notes=(*_untouched(lora, parts), *_idle(idle, len(lora.modules))),
        hashes=hashes.by_name(),
        metadata=dict(sorted(lora.metadata.items())),
    )


def _part(changes: Sequence[Change], norms: Sequence[float | None]) -> LoraPart:
    return LoraPart(
        modules=len(changes),
        rank=Spread.of([change.rank for change in changes if change.rank is not None]),
        alpha=Spread.of([change.alpha for change in changes if change.alpha is not None]),
        scale=Spread.of([change.alpha / change.rank for change in changes if change.rank and change.alpha is not None]),
        norm=sum((norm or 0.0) ** 2 for norm in norms) ** 0.5,
    )


def _stale_hashes(metadata: Mapping[str, str], hashes: FileHashes) -> list[str]:
    stated = {
        "sshs_model_hash": metadata.get("sshs_model_hash"),
        "modelspec.hash_sha256": metadata.get("modelspec.hash_sha256", "").removeprefix("0x") or None,
    }
    stale = [key for key, value in stated.items() if value and value.lower() != hashes.payload_sha256]
    return [f"the hash in the header is stale ({key}): it is not that of the file's tensors" for key in stale]


def _not_finite(lora: LoraFile) -> list[str]:
    broken = lora.broken
    return [f"NaN or infinity in {len(broken)} modules, such as {broken[0]}"] if broken else []


def _untouched(lora: LoraFile, parts: Collection[str]) -> list[str]:
    if lora.family is None or "unknown" in parts:
        return []
    note = _UNTOUCHED.get(tuple(part for part in lora.family.lora_parts if part not in parts))
    return [note] if note else []


def _idle(idle: Sequence[str], total: int) -> list[str]:
    if not idle:
        return []
    return [f"{len(idle)} of {total} modules have all-zero up matrices and change nothing, such as {idle[0]}"]
