"""What a file is, told without a base: a LoRA, or a checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .base.checkpoint import MINI, MINI_FOLDER
from .base.parts import PARTS as CHECKPOINT_PARTS
from .base.parts import TITLES
from .base.sniff import Sniffed, sniff
from .errors import LoraFileError
from .formats.hashes import FileHashes, cached_hashes, hash_file
from .formats.keys import PARTS, part_of
from .formats.lora_file import PEFT_WEIGHTS, LoraFile, is_lora, read_lora
from .formats.metadata import trigger_words
from .formats.tensor_files import open_tensor_file
from .progress import Progress


@dataclass(frozen=True, kw_only=True)
class Spread:
    min: float
    median: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ``inspect`` found; fields that do not apply to its ``kind`` are None."""

    kind: str
    """``lora`` or ``checkpoint``."""
    file: str
    family: str | None
    dialect: str
    modules: dict[str, int]
    kinds: dict[str, int] | None = None
    """Kind of change -> number of modules, of a LoRA."""
    rank: Spread | None
    alpha: Spread | None
    norm: dict[str, float] | None
    """Frobenius norm of the change, over all modules of a part."""
    dtype: str | None
    prediction: str | None
    prediction_source: str | None = None
    """By what a checkpoint's prediction type was told."""
    zero_terminal_snr: bool | None = None
    resolution: int | None = None
    """Side in pixels of the square picture that a checkpoint was made for."""
    parameters: dict[str, int] | None = None
    """Of a checkpoint, by part."""
    ema_tensors: int | None = None
    embeddings: tuple[str, ...] = ()
    """Bundled with a LoRA."""
    trigger: tuple[str, ...]
    problems: tuple[str, ...]
    """What is wrong with it, or why it cannot be used."""
    notes: tuple[str, ...] = ()
    """What is worth knowing and does no harm."""
    hashes: dict[str, str]
    metadata: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_file(path: str, *, hashes: bool, progress: Progress) -> Report:
    """Report on a LoRA file, ``mini``, a checkpoint file, or the folder of a diffusers checkpoint.

    Raises:
        LoraFileError, BaseModelError: it is neither, or it is damaged.
    """
    file = Path(path)
    if (file / "adapter_config.json").is_file():
        return _lora_report(read_lora(file))
    if path == MINI or file.is_dir():
        return _checkpoint_report(sniff(MINI_FOLDER if path == MINI else file), name=file.name, hashes=None)
    if is_lora(open_tensor_file(file, LoraFileError).tensors):
        return _lora_report(read_lora(file))
    found = sniff(file)
    own = cached_hashes(file, found.files[0].payload_start, progress) if hashes else None
    return _checkpoint_report(found, name=file.name, hashes=own)


def _lora_report(lora: LoraFile) -> Report:
    weights = lora.path / PEFT_WEIGHTS if lora.path.is_dir() else lora.path
    hashes = hash_file(weights, open_tensor_file(weights, LoraFileError).payload_start)
    stated = lora.metadata.get("sshs_model_hash")
    problems = list(lora.problems)
    if stated and stated != hashes.payload_sha256:
        problems.append("the hash in its metadata (sshs_model_hash) is not that of its tensors")
    counts = Counter(part_of(key) or "unknown" for key in lora.modules)
    norms: dict[str, float] = {}
    unknown: list[str] = []
    for key, module in lora.modules.items():
        part = part_of(key) or "unknown"
        norm = module.norm()
        norms[part] = norms.get(part, 0.0) + (0.0 if norm is None else norm**2)
        unknown += [part] if norm is None else []
    problems += [
        f"{part}: every change is zero; it has no effect"
        for part, square in norms.items()
        if square == 0 and part not in unknown
    ]
    return Report(
        kind="lora",
        file=lora.path.name,
        family=lora.family.name if lora.family else None,
        dialect=lora.dialect,
        modules={part: counts[part] for part in (*PARTS, "unknown") if counts[part] or part in PARTS},
        kinds=lora.kinds,
        embeddings=lora.embeddings,
        rank=Spread(min=lora.ranks[0], median=lora.ranks[1], max=lora.ranks[2]),
        alpha=Spread(min=lora.alphas[0], median=lora.alphas[1], max=lora.alphas[2]),
        norm={part: square**0.5 for part, square in norms.items()},
        dtype=lora.dtype,
        prediction={"v": "v_prediction", "epsilon": "epsilon"}.get(lora.metadata.get("modelspec.prediction_type", "")),
        trigger=trigger_words(lora.metadata),
        problems=tuple(problems),
        hashes=hashes.by_name(),
        metadata=dict(sorted(lora.metadata.items())),
    )


def _checkpoint_report(found: Sniffed, *, name: str, hashes: FileHashes | None) -> Report:
    dtypes: Counter[str] = Counter()
    for part in found.parts.values():
        dtypes.update({str(dtype).removeprefix("torch."): count for dtype, count in part.dtypes().items()})
    family, problems = found.family, [f"it {found.refusal}"] if found.refusal else []
    if family is not None:
        needed = ("unet", "vae", *(encoder.part for encoder in family.text_encoders))
        problems += [f"it holds no {TITLES[part]}" for part in needed if part not in found.parts]
    return Report(
        kind="checkpoint",
        file=name,
        family=family.name if family else None,
        dialect=found.dialect,
        modules={part: len(found.parts[part].tensors) for part in CHECKPOINT_PARTS if part in found.parts},
        rank=None,
        alpha=None,
        norm=None,
        dtype=", ".join(dtype for dtype, _ in dtypes.most_common()) or None,
        prediction=found.schedule.prediction if family else None,
        prediction_source=found.prediction_source if family else None,
        zero_terminal_snr=found.schedule.zero_terminal_snr,
        resolution=found.resolution,
        parameters={part: found.parts[part].parameters() for part in CHECKPOINT_PARTS if part in found.parts},
        ema_tensors=found.ema_tensors,
        trigger=(),
        problems=tuple(problems),
        notes=found.notes,
        hashes={} if hashes is None else hashes.by_name(),
        metadata=dict(sorted(found.metadata.items())),
    )
