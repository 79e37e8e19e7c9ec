"""The LoRA file that a run starts from, ``lora.start_from``."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..base.checkpoint import BaseCheckpoint
from ..files import printable
from ..generation.loras import LoraChoice, fit_loras
from ..lora.change import Change
from .module_choice import ModuleChoice


@dataclass(frozen=True, kw_only=True, eq=False)
class StartValues:
    """What the file holds, by the names of the base."""

    file: Path
    changes: Mapping[str, Change]
    """Canonical name -> change, of the modules that the base has, trained or not."""
    digest: str
    """SHA-256 of the changes, whatever the format and the metadata of the file."""

    def in_words(self, chosen: Mapping[str, ModuleChoice]) -> str:
        """Which of the modules that are trained start from the file, and how, in one line."""
        started = {name: self.changes[name] for name in chosen if name in self.changes}
        counts = Counter(_fate(change, chosen[name]) for name, change in started.items())
        parts = [f"{counts[fate]} {words}" for fate, words in _FATES.items() if counts[fate]]
        if fresh := len(chosen) - len(started):
            parts.append(f"{fresh} trained modules are not in it and start fresh")
        if unused := len(self.changes) - len(started):
            parts.append(f"{unused} of its modules are not trained and are left out")
        if any(change.bias_delta() is not None for change in started.values()):
            parts.append("its changes of biases are left out")
        total = f"{len(started)} of {len(chosen)} trained modules start from {printable(self.file)}"
        return "; ".join([total, *parts])


_FATES = {
    "padded": "of a lower rank are padded",
    "truncated": "of a higher rank are truncated by SVD",
    "approximated": "of another kind are approximated by SVD",
}


def _fate(change: Change, choice: ModuleChoice) -> str:
    if change.kind != "lora" or "lora_mid.weight" in change.tensors():
        return "approximated"
    rank = change.rank or 0
    return "exact" if rank == choice.rank else "padded" if rank < choice.rank else "truncated"


def read_start(base: BaseCheckpoint, file: Path) -> StartValues:
    """Read ``file``, in any format of LoRAs, for ``base``. What it holds for no module of the base is logged.

    Raises:
        LoraFileError, CompatibilityError: it cannot be read, or is for another family.
    """
    (lora,) = fit_loras(base, [LoraChoice(file=file)])
    changes = lora.fitted.modules
    return StartValues(file=file, changes=changes, digest=_digest(changes))


def _digest(changes: Mapping[str, Change]) -> str:
    digest = hashlib.sha256()
    for name, change in sorted(changes.items()):
        digest.update(f"{name} {change.kind} {change.alpha}\n".encode())
        for key, tensor in sorted(change.tensors().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            # Bytes, since NumPy has no bfloat16.
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
