"""The hashes by which other tools know a file (definitions: kohya-ss/sd-scripts and the AUTOMATIC1111 webui)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

_SLICE_START, _SLICE_LENGTH = 0x100000, 0x10000


@dataclass(frozen=True, kw_only=True)
class FileHashes:
    """Lower-case hexadecimal. ``autov3`` is the start of the hash over all bytes behind the header."""

    sha256: str
    autov1: str
    autov2: str
    payload_sha256: str

    @property
    def autov3(self) -> str:
        return self.payload_sha256[:12]


def hash_file(path: Path, payload_start: int) -> FileHashes:
    """Read ``path`` once; ``payload_start`` is the offset of the first tensor byte."""
    whole, payload, position = hashlib.sha256(), hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            whole.update(chunk)
            payload.update(chunk[max(0, payload_start - position) :])
            position += len(chunk)
        file.seek(_SLICE_START)
        autov1 = hashlib.sha256(file.read(_SLICE_LENGTH)).hexdigest()[:8]
    digest = whole.hexdigest()
    return FileHashes(sha256=digest, autov1=autov1, autov2=digest[:10], payload_sha256=payload.hexdigest())


def legacy_hash(data: bytes) -> str:
    """``sshs_legacy_hash`` and AutoV1 of bytes: 64 KiB from 1 MiB on; shorter files all give ``e3b0c442``."""
    return hashlib.sha256(data[_SLICE_START : _SLICE_START + _SLICE_LENGTH]).hexdigest()[:8]
