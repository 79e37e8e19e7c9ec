"""What a library says about one LoRA file, and about a folder of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_KEYS = {"format": "dialect", "ranks": "rank"}


@dataclass(frozen=True, kw_only=True)
class LoraEntry:
    """One LoRA file; all but hashes and preview is from its header, so nothing says that its numbers are sound."""

    file: str
    """Path within the folder, with forward slashes."""
    name: str
    """By which prompts call it: the file's name without its ending, or that of the folder of a PEFT adapter."""
    alias: str | None
    """``ss_output_name``, by which prompts can call it too, where it differs."""
    title: str | None
    """``modelspec.title``."""
    family: str | None
    """``sd1``, ``sd2`` or ``sdxl``."""
    made_for: str | None
    """The base that the metadata state, such as ``sd_xl_base_1.0.safetensors`` or ``flux1``."""
    layout: str
    """Digest of names, dtypes, shapes and places of the tensors: one for all files of one trainer, base and rank."""
    format: str
    """Format of the tensors' names, such as ``kohya``."""
    kinds: Mapping[str, int]
    """Kind of change -> number of modules."""
    modules: Mapping[str, int]
    """Part -> number of modules."""
    ranks: tuple[int, int] | None
    """Lowest and highest; None where no module has a rank."""
    dtype: str
    bytes: int
    """Size of the file."""
    modified: float
    """Time of the last change of the file, in seconds since 1970."""
    trigger: tuple[str, ...]
    """From the metadata, or else the ``activation text`` of A1111's card beside the file."""
    preview: str | None
    """Image beside the file, as a path within the folder."""
    autov2: str | None
    """First ten digits of the SHA-256 of the file; None until it was computed."""
    autov3: str | None
    """First twelve digits of the SHA-256 of the tensors: computed, or else as the metadata state it."""
    hashed: bool
    """Whether the hashes were computed from the file as it is now."""
    fits: bool | None = None
    """Whether it fits the base that was asked for; None where none was."""
    reason: str | None = None
    """Why it does not fit, or which part of it does not, as the end of a sentence."""

    @property
    def rank(self) -> str:
        """``16``, ``4-32`` or nothing."""
        if self.ranks is None:
            return ""
        low, high = self.ranks
        return f"{low}" if low == high else f"{low}-{high}"

    def to_json(self) -> dict[str, Any]:
        """All fields by their names, except that format and ranks have the keys that ``inspect --json`` gives them."""
        fields = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        low, high = self.ranks or (None, None)
        return fields | {"rank": {"min": low, "max": high}}


@dataclass(frozen=True, kw_only=True)
class BrokenFile:
    """A file that cannot be listed."""

    file: str
    problem: str
    """One line."""


@dataclass(frozen=True, kw_only=True)
class LoraLibrary:
    """What was found in a folder and the folders in it."""

    folder: str
    loras: tuple[LoraEntry, ...]
    """Sorted by path."""
    broken: tuple[BrokenFile, ...]
    others: int
    """Number of safetensors files that are no LoRAs, such as checkpoints and embeddings."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Files with equal tensors, in groups; searched for where it was asked for."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        loras = [entry.to_json() for entry in self.loras]
        return asdict(self) | {"loras": loras, "count": len(loras)}
