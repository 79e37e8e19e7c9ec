"""``inspect``: which kind a file is, and the report on a checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..base.checkpoint import MINI, base_path
from ..base.detect import DetectedCheckpoint, detect_checkpoint
from ..errors import LoraFileError
from ..families import PART_TITLES, PARTS
from ..formats.hashes import FileHashes, file_hashes
from ..formats.lora_file import lora_in, read_lora
from ..formats.lora_names import is_lora
from ..formats.tensor_files import open_tensor_file
from ..progress import Progress, progress_or_bar
from .inspect_image import IMAGES, image_report
from .inspect_lora import lora_report
from .inspect_report import InspectReport


def inspect(path: str | Path, *, hashes: bool = False, progress: Progress | None = None) -> InspectReport:
    """Examine a LoRA file, the folder of a PEFT adapter, ``mini``, a checkpoint file, a diffusers folder or an image.

    Args:
        hashes: whether a checkpoint's hashes are computed, for which its whole file is read; a LoRA's always are.
        progress: a bar on standard error by default.

    Raises:
        LoraFileError, BaseModelError, DataError: the file is missing, damaged or none of these.
    """
    with progress_or_bar(progress) as shown:
        return _inspect(str(path), hashes, shown)


def _inspect(path: str, hashes: bool, progress: Progress) -> InspectReport:
    file = Path(path)
    if file.suffix.lower() in IMAGES and not file.is_dir():
        return image_report(file)
    if (file / "adapter_config.json").is_file():
        return lora_report(read_lora(file))
    if path == MINI or file.is_dir():
        return _checkpoint_report(detect_checkpoint(base_path(path)), name=file.name, hashes=None)
    opened = open_tensor_file(file, LoraFileError)
    if is_lora(opened.tensors):
        return lora_report(lora_in(opened))
    found = detect_checkpoint(file)
    digests = file_hashes(file, progress) if hashes else None
    return _checkpoint_report(found, name=file.name, hashes=digests)


def _checkpoint_report(found: DetectedCheckpoint, *, name: str, hashes: FileHashes | None) -> InspectReport:
    dtypes: Counter[str] = Counter()
    for part in found.parts.values():
        dtypes.update({str(dtype).removeprefix("torch."): count for dtype, count in part.dtypes().items()})
    if not dtypes:
        stored = [tensor.dtype for file in found.files for tensor in file.tensors.values()]
        dtypes.update(str(dtype).removeprefix("torch.") for dtype in stored)
    family, problems = found.family, [f"it {found.refusal}"] if found.refusal else []
    if family is not None:
        problems += [f"it holds no {PART_TITLES[part]}" for part in family.parts if part not in found.parts]
    return InspectReport(
        kind=found.kind,
        title=found.title.partition(" ")[2] if found.title else None,
        file=name,
        family=family.name if family else None,
        format=found.format,
        modules={part: len(found.parts[part].tensors) for part in PARTS if part in found.parts},
        dtype=", ".join(dtype for dtype, _ in dtypes.most_common()) or None,
        prediction=found.schedule.prediction if family else None,
        prediction_source=found.prediction_source if family else None,
        zero_terminal_snr=found.schedule.zero_terminal_snr,
        resolution=found.resolution,
        parameters={part: found.parts[part].parameters() for part in PARTS if part in found.parts},
        ema_tensors=found.ema_tensors,
        problems=tuple(problems),
        notes=found.notes,
        hashes={} if hashes is None else hashes.by_name(),
        metadata=dict(sorted(found.metadata.items())),
    )
