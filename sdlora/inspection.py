"""What a file is, told without a base: a LoRA file, or a checkpoint folder."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .base.load import MINI, BaseFolder, find_base
from .errors import LoraFileError
from .formats.hashes import hash_file
from .formats.keys import PARTS, part_of
from .formats.lora_file import LoraFile, read_lora
from .formats.metadata import trigger_words
from .formats.safetensors_file import read_header


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
    rank: Spread | None
    alpha: Spread | None
    norm: dict[str, float] | None
    """Frobenius norm of the change, over all modules of a part."""
    dtype: str | None
    prediction: str | None
    trigger: tuple[str, ...]
    problems: tuple[str, ...]
    hashes: dict[str, str]
    metadata: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_file(path: str) -> Report:
    """Report on a LoRA file, ``mini``, or the folder of a diffusers checkpoint.

    Raises:
        LoraFileError, BaseModelError: it is neither, or it is damaged.
    """
    if path == MINI or Path(path).is_dir():
        return _checkpoint_report(find_base(path))
    return _lora_report(read_lora(Path(path)))


def _lora_report(lora: LoraFile) -> Report:
    hashes = hash_file(lora.path, read_header(lora.path, LoraFileError).payload_start)
    stated = lora.metadata.get("sshs_model_hash")
    problems = list(lora.problems)
    if stated and stated != hashes.payload_sha256:
        problems.append("the hash in its metadata (sshs_model_hash) is not that of its tensors")
    counts = Counter(part_of(key) or "unknown" for key in lora.modules)
    norms: dict[str, float] = {}
    for key, module in lora.modules.items():
        part = part_of(key) or "unknown"
        norms[part] = norms.get(part, 0.0) + module.norm() ** 2
    problems += [f"{part}: every change is zero; it has no effect" for part, square in norms.items() if square == 0]
    return Report(
        kind="lora",
        file=lora.path.name,
        family=lora.family.name if lora.family else None,
        dialect=lora.dialect,
        modules={part: counts[part] for part in (*PARTS, "unknown") if counts[part] or part in PARTS},
        rank=Spread(min=lora.ranks[0], median=lora.ranks[1], max=lora.ranks[2]),
        alpha=Spread(min=lora.alphas[0], median=lora.alphas[1], max=lora.alphas[2]),
        norm={part: square**0.5 for part, square in norms.items()},
        dtype=lora.dtype,
        prediction={"v": "v_prediction", "epsilon": "epsilon"}.get(lora.metadata.get("modelspec.prediction_type", "")),
        trigger=trigger_words(lora.metadata),
        problems=tuple(problems),
        hashes={
            "sha256": hashes.sha256,
            "autov1": hashes.autov1,
            "autov2": hashes.autov2,
            "autov3": hashes.autov3,
        },
        metadata=dict(sorted(lora.metadata.items())),
    )


def _checkpoint_report(base: BaseFolder) -> Report:
    from .errors import BaseModelError

    tensors, dtypes = {}, set()
    for part in PARTS[:2]:
        files = [file for file in (base.folder / part).iterdir() if file.suffix == ".safetensors"]
        headers = [read_header(file, BaseModelError) for file in files]
        tensors[part] = sum(len(header.tensors) for header in headers)
        dtypes |= {str(info.dtype).removeprefix("torch.") for header in headers for info in header.tensors.values()}
    return Report(
        kind="checkpoint",
        file=base.name,
        family=base.family.name,
        dialect="diffusers",
        modules=tensors,
        rank=None,
        alpha=None,
        norm=None,
        dtype=", ".join(sorted(dtypes)),
        prediction=base.schedule.get("prediction_type", "epsilon"),
        trigger=(),
        problems=(),
        hashes={"fingerprint": base.fingerprint},
        metadata={},
    )
