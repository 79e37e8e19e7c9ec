"""The files of the cache of encoded images and captions: ``KIND/ab/cdef….safetensors``, in a folder that runs share.

Nothing of torch here: the verbs that look after the folder answer at once.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from ..config.sections import CacheSection
from ..files import cache_folder

Kind = Literal["latents", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_STALE_SECONDS = 3600
"""A half-written file that is older belongs to no living process."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of the cache, as its folder tells it."""

    kind: Kind
    file: Path
    bytes: int
    used: float
    """Seconds since 1970 when it was last read or written."""


@dataclass(frozen=True, kw_only=True)
class KindSize:
    entries: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What a cache holds; ``oldest`` and ``newest`` are last uses, ISO 8601 in UTC, None where there is no entry."""

    folder: str
    entries: int
    bytes: int
    oldest: str | None
    newest: str | None
    kinds: dict[Kind, KindSize]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def encoded_folder(section: CacheSection | None = None) -> Path:
    """Where entries are kept by default, or by ``cache.folder``."""
    named = section.folder if section else None
    return Path(named) if named else cache_folder() / "encoded"


def cache_info(folder: Path) -> CacheInfo:
    """Count what is in ``folder``; nothing where there is no such folder."""
    found = tuple(entries(folder))
    used = sorted(entry.used for entry in found)
    sizes = {kind: [entry.bytes for entry in found if entry.kind == kind] for kind in KINDS}
    return CacheInfo(
        folder=str(folder),
        entries=len(found),
        bytes=sum(entry.bytes for entry in found),
        oldest=_as_date(used[0]) if used else None,
        newest=_as_date(used[-1]) if used else None,
        kinds={kind: KindSize(entries=len(own), bytes=sum(own)) for kind, own in sizes.items()},
    )


def _as_date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def entries(folder: Path) -> Iterator[Entry]:
    """Every entry in ``folder``, whole or damaged, in no order; nothing else that may lie there."""
    for kind in KINDS:
        for file in _files(folder / kind):
            if not re.fullmatch(r"[0-9a-f]{62}\.safetensors", file.name):
                continue
            with suppress(OSError):  # Another process may have removed it meanwhile.
                status = file.stat()
                yield Entry(kind=kind, file=Path(file.path), bytes=status.st_size, used=status.st_mtime)


def prune(folder: Path, max_bytes: float) -> tuple[Entry, ...]:
    """Remove the least recently used entries until at most ``max_bytes`` are left, and what kills have left half-written.

    The answer is what was removed; what cannot be removed stays.
    """
    for kind in KINDS:
        for file in _files(folder / kind):
            with suppress(OSError):
                if file.name.endswith(".partial") and time.time() - file.stat().st_mtime > _STALE_SECONDS:
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
            pass  # Another process is at it too.
        except OSError:
            continue
        surplus -= entry.bytes
    return tuple(removed)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The files in the fan-out folders of ``folder``."""
    with suppress(OSError), os.scandir(folder) as fans:
        for fan in fans:
            if re.fullmatch(r"[0-9a-f]{2}", fan.name):
                with suppress(OSError), os.scandir(fan.path) as files:
                    yield from files


def file_of(folder: Path, kind: Kind, digest: str) -> Path:
    """Where the entry of a key is."""
    return folder / kind / digest[:2] / f"{digest[2:]}.safetensors"


def write_entry(file: Path, data: bytes) -> None:
    """Write ``file`` whole or not at all, unless the power goes: nothing is flushed, since a torn entry is only a miss.

    Raises:
        OSError: the disk is full or cannot be written to; nothing is left behind.
    """
    partial = file.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with _created(partial) as stream:
            stream.write(data)
        os.replace(partial, file)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _created(file: Path) -> BinaryIO:
    try:
        return file.open("xb")
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("xb")
