"""Files of the cache: ``KIND/ab/cdef….safetensors``, in a folder that all runs share.

This module does not import torch, so ``sdlora cache`` answers at once.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from ..config.sections import CacheSection
from ..files import PARTIAL_SUFFIX, cache_folder, write_whole

Kind = Literal["latents", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_STALE_SECONDS = 3600
"""An older half-written file belongs to no living process."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of the cache, as listed by its folder."""

    kind: Kind
    file: Path
    bytes: int
    used: float
    """When it was last read or written, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class KindSize:
    """Number and bytes of the entries of one kind."""

    entries: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What a cache holds; ``oldest`` and ``newest`` are last uses, ISO 8601 in UTC, None without entries."""

    folder: str
    entries: int
    bytes: int
    oldest: str | None
    newest: str | None
    kinds: dict[Kind, KindSize]

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)


def encoded_folder(section: CacheSection | None = None) -> Path:
    """The folder of ``cache.folder``, or the default one in the user's cache folder."""
    configured = section.folder if section else None
    return Path(configured) if configured else cache_folder() / "encoded"


def cache_info(folder: Path) -> CacheInfo:
    """Count the entries in ``folder``; zero if it does not exist."""
    found = tuple(entries(folder))
    used = sorted(entry.used for entry in found)
    sizes = {kind: [entry.bytes for entry in found if entry.kind == kind] for kind in KINDS}
    return CacheInfo(
        folder=str(folder),
        entries=len(found),
        bytes=sum(entry.bytes for entry in found),
        oldest=_as_date(used[0]) if used else None,
        newest=_as_date(used[-1]) if used else None,
        kinds={
            kind: KindSize(entries=len(bytes_of_kind), bytes=sum(bytes_of_kind))
            for kind, bytes_of_kind in sizes.items()
        },
    )


def _as_date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def entries(folder: Path) -> Iterator[Entry]:
    """Every entry in ``folder``, whole or damaged, in no order; other files are ignored."""
    for kind in KINDS:
        for file in _files(folder / kind):
            if not re.fullmatch(r"[0-9a-f]{62}\.safetensors", file.name):
                continue
            with suppress(OSError):  # Another process may have removed it meanwhile.
                status = file.stat()
                yield Entry(kind=kind, file=Path(file.path), bytes=status.st_size, used=status.st_mtime)


def prune(folder: Path, max_bytes: float) -> tuple[Entry, ...]:
    """Remove the least recently used entries until at most ``max_bytes`` are left, and old half-written files.

    Returns the removed entries. A file that cannot be removed stays.
    """
    for kind in KINDS:
        for file in _files(folder / kind):
            with suppress(OSError):
                if file.name.endswith(PARTIAL_SUFFIX) and time.time() - file.stat().st_mtime > _STALE_SECONDS:
                    os.unlink(file.path)
    present = sorted(entries(folder), key=lambda entry: (entry.used, entry.file.name))
    surplus, removed = sum(entry.bytes for entry in present) - max_bytes, []
    for entry in present:
        if surplus <= 0:
            break
        try:
            entry.file.unlink()
            removed.append(entry)
        except FileNotFoundError:
            pass  # Another process removed it.
        except OSError:
            continue
        surplus -= entry.bytes
    return tuple(removed)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The files in the two-letter folders of ``folder``."""
    with suppress(OSError), os.scandir(folder) as prefixes:
        for prefix in prefixes:
            if re.fullmatch(r"[0-9a-f]{2}", prefix.name):
                with suppress(OSError), os.scandir(prefix.path) as files:
                    yield from files


def file_of(folder: Path, kind: Kind, digest: str) -> Path:
    """The file of the entry with this ``kind`` and ``digest``."""
    return folder / kind / digest[:2] / f"{digest[2:]}.safetensors"


def write_entry(file: Path, data: bytes) -> None:
    """Write ``file`` whole or not at all. Nothing is flushed: what a power cut tears is only a miss.

    Raises:
        OSError: the disk is full or read-only; no partial file is left.
    """
    write_whole(file, data, durable=False)
