"""The files of a folder of LoRAs, with their previews and A1111's cards; nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraFileError
from ..formats.lora_names import PEFT_WEIGHTS
from ..formats.run_names import RUN_SUFFIX

PREVIEW_ENDINGS = (
    ".preview.png",
    ".png",
    *(f"{dot}.{kind}" for kind in ("jpg", "jpeg", "webp", "gif") for dot in (".preview", "")),
)
"""What follows a LoRA's name in the name of its preview, the first that exists: as A1111 and Civitai's helpers name it."""


@dataclass(frozen=True, kw_only=True)
class FoundFile:
    """A safetensors file."""

    path: str
    """Absolute."""
    file: str
    """Within the folder, with forward slashes."""
    size: int
    modified_ns: int
    preview: str | None
    """Within the folder."""
    card: str | None
    """Path of ``NAME.json`` beside it."""
    card_stamp: int
    """When that was last changed, in nanoseconds; 0 without one."""

    @property
    def stamp(self) -> tuple[int, int, int]:
        """What changes when the file or its card does."""
        return self.size, self.modified_ns, self.card_stamp

    @property
    def name(self) -> str:
        """By which prompts call it."""
        folder, _, name = self.file.rpartition("/")
        return folder.rpartition("/")[2] if folder and name == PEFT_WEIGHTS else name.removesuffix(".safetensors")


def found_files(folder: Path) -> list[FoundFile]:
    """The safetensors files in ``folder`` and below, sorted by path.

    Hidden folders and the checkpoints of half-done runs are left out. Links to folders are followed, each folder once.

    Raises:
        LoraFileError: there is no such folder, or it cannot be read. A folder below it that cannot be read is left out.
    """
    if not folder.is_dir():
        raise LoraFileError(f"{folder}: no such folder of LoRAs")
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise LoraFileError(f"{folder}: cannot be read: {error.strerror}") from None
    return sorted(_walk(os.path.abspath(folder), "", set()), key=lambda found: found.file)


def _walk(folder: str, within: str, seen: set[tuple[int, int]]) -> Iterator[FoundFile]:
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen and status.st_ino:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listing:
            entries = {entry.name: entry for entry in listing}
    except OSError:
        return
    for name, entry in entries.items():
        try:
            if name.endswith(".safetensors") and entry.is_file():
                yield _found(entry, entries, within)
            elif not name.startswith(".") and not name.endswith(RUN_SUFFIX) and entry.is_dir():
                yield from _walk(entry.path, f"{within}{name}/", seen)
        except OSError:  # It has gone since.
            continue


def _found(entry: os.DirEntry[str], beside: dict[str, os.DirEntry[str]], within: str) -> FoundFile:
    status, stem = entry.stat(), entry.name.removesuffix(".safetensors")
    preview = next((name for ending in PREVIEW_ENDINGS if (name := stem + ending) in beside), None)
    card = beside.get(f"{stem}.json")
    return FoundFile(
        path=entry.path,
        file=within + entry.name,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        preview=within + preview if preview else None,
        card=card.path if card else None,
        card_stamp=card.stat().st_mtime_ns if card else 0,
    )
