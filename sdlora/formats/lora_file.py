"""LoRA files, read into records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..errors import LoraFileError
from ..families import Family
from ..lora.change import Change
from .lora_family import detect_family
from .lora_names import BUNDLED, PEFT_WEIGHTS, format_of, group_by_module
from .lora_tensors import build_change
from .peft_settings import Scale, scales_from, scales_in
from .tensor_files import TensorFile, mapped_tensors, open_tensor_file

MAX_TENSORS = 50_000
"""Ten times what the largest LoRA of any family holds."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA as its file has it; ``modules`` is keyed by the names of the tensors without their suffixes.

    What cannot be used is left out of ``modules`` and always reported: ``problems`` has a sentence on each.
    """

    path: Path
    modules: Mapping[str, Change]
    bundled: Mapping[str, Tensor]
    """The tensors of textual-inversion embeddings that came with it, as the file names them."""
    metadata: Mapping[str, str]
    format: str
    """``kohya``, ``diffusers``, ``peft``, ``diffusers-processor``, ``comfyui`` or ``simpletuner``."""
    dtype: str
    """Dtype of the tensors, such as ``float16``; several are separated by commas."""
    payload_start: int
    """Offset in bytes of the first tensor; 0 in a pickle."""
    unusable: Mapping[str, str]
    """Module -> why it cannot be used, as the end of a sentence."""
    foreign: tuple[str, ...]
    """Names of the tensors that mean nothing here."""

    @property
    def weights(self) -> Path:
        """The file that holds the tensors, also where ``path`` is the folder of a PEFT adapter."""
        return self.path / PEFT_WEIGHTS if self.path.is_dir() else self.path

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence on each tensor and module that cannot be used."""
        foreign = [f"tensor {name} is of a kind that cannot be applied" for name in self.foreign]
        return (*foreign, *(f"module {module} {reason}" for module, reason in self.unusable.items()))

    @property
    def family(self) -> Family | None:
        """By names and shapes first, by metadata where those leave it open; None where nothing shows it."""
        return detect_family(self.modules, self.metadata)

    @property
    def broken(self) -> tuple[str, ...]:
        """Modules that hold NaN or infinity."""
        return tuple(module for module, reason in self.unusable.items() if reason.startswith("holds NaN"))

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Names of the bundled embeddings."""
        return tuple(sorted({name.split(".")[1] for name in self.bundled}))

    @property
    def kinds(self) -> dict[str, int]:
        """Kind -> number of modules."""
        return dict(Counter(module.kind for module in self.modules.values()))


def read_lora(path: Path) -> LoraFile:
    """Read every module of a LoRA file in any of the common formats, or of the folder of a PEFT adapter.

    Raises:
        LoraFileError: the file is missing, damaged, a pickle that is not trusted, or holds no LoRA.
    """
    if path.is_dir():
        return _read_adapter_folder(path)
    return lora_in(open_tensor_file(path, LoraFileError))


def lora_in(file: TensorFile) -> LoraFile:
    """``read_lora`` for a file that is open already. Raises as it does."""
    return _read(file, scales_in(file.path, file.metadata))


def _read(file: TensorFile, scale_of: Callable[[str], Scale]) -> LoraFile:
    path = file.path
    if len(file.tensors) > MAX_TENSORS:
        raise LoraFileError(f"{path}: not a LoRA: it holds {len(file.tensors):,} tensors, the largest hold about 5,000")
    bundled = {name for name in file.tensors if name.startswith(BUNDLED)}
    grouped, foreign = group_by_module(name for name in file.tensors if name not in bundled)
    if not grouped:
        raise LoraFileError(f"{path}: holds no LoRA: none of its {len(file.tensors)} tensors is named like one")
    modules: dict[str, Change] = {}
    unusable: dict[str, str] = {}
    tensor = mapped_tensors(file)
    for key, roles in sorted(grouped.items()):
        short = key.removeprefix("base_model.model.")
        try:
            modules[short] = build_change({r: tensor(n) for r, n in roles.items()}, scale=scale_of(short))
        except (ValueError, RuntimeError) as fault:
            unusable[short] = str(fault)
    embeddings = {name: tensor(name) for name in sorted(bundled)}
    if not modules:
        module, reason = next(iter(unusable.items()))
        raise LoraFileError(f"{path}: none of its {len(unusable)} modules can be used; for example {module} {reason}")
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for m in modules.values() for t in m.tensors().values()})
    return LoraFile(
        path=path,
        modules=modules,
        bundled=embeddings,
        metadata=dict(file.metadata),
        format=format_of(file.tensors),
        dtype=", ".join(dtype for dtype in dtypes if not dtype.startswith("int")),
        payload_start=file.payload_start,
        unusable=unusable,
        foreign=tuple(foreign),
    )


def _read_adapter_folder(folder: Path) -> LoraFile:
    """``adapter_model.safetensors`` with the ``adapter_config.json`` that PEFT writes beside it."""
    config, weights = folder / "adapter_config.json", folder / PEFT_WEIGHTS
    missing = [file.name for file in (config, weights) if not file.is_file()]
    if missing:
        raise LoraFileError(f"{folder}: not the folder of a PEFT adapter: it lacks {' and '.join(missing)}")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise LoraFileError(f"{config}: cannot be read as JSON: {fault}") from None
    if not isinstance(settings, dict):
        raise LoraFileError(f"{config}: expected a JSON object with PEFT's settings")
    scale_of = scales_from(config, {"": settings})
    return replace(_read(open_tensor_file(weights, LoraFileError), scale_of), path=folder)
