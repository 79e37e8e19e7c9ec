"""The hashes by which other tools identify a file (definitions: kohya-ss/sd-scripts and the AUTOMATIC1111 webui)."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import cache_folder, write_whole
from ..progress import Progress, Silence

_SLICE_START, _SLICE_LENGTH = 0x100000, 0x10000
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FileHashes:
    """Lower-case hexadecimal. ``payload_sha256`` is over all bytes after the header; None for a file without a header."""

    sha256: str
    autov1: str
    payload_sha256: str | None

    @property
    def autov2(self) -> str:
        """First ten digits of the SHA-256 of the whole file, by which Civitai finds checkpoints."""
        return self.sha256[:10]

    @property
    def autov3(self) -> str | None:
        """First twelve digits of the SHA-256 of the tensors' bytes, by which Civitai finds LoRAs; None for a pickle."""
        return self.payload_sha256 and self.payload_sha256[:12]

    def by_name(self) -> dict[str, str]:
        """Hash's name, as in ``inspect --json`` -> hash."""
        names = {"sha256": self.sha256, "autov1": self.autov1, "autov2": self.autov2, "autov3": self.autov3}
        return {name: digest for name, digest in names.items() if digest}


def hash_file(path: Path, payload_start: int, progress: Progress | None = None) -> FileHashes:
    """Hash ``path``, which is read once.

    Args:
        payload_start: offset in bytes of the first tensor; 0 for a file without a header.

    Raises:
        OSError: the file cannot be read.
    """
    whole, payload, position = hashlib.sha256(), hashlib.sha256(), 0
    progress = progress or Silence()
    progress.start("Hashing", -(-path.stat().st_size // _CHUNK))
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            whole.update(chunk)
            if payload_start:
                payload.update(chunk[max(0, payload_start - position) :])
            position += len(chunk)
            progress.advance()
        file.seek(_SLICE_START)
        autov1 = hashlib.sha256(file.read(_SLICE_LENGTH)).hexdigest()[:8]
    return FileHashes(
        sha256=whole.hexdigest(), autov1=autov1, payload_sha256=payload.hexdigest() if payload_start else None
    )


def file_hashes(path: Path, progress: Progress | None = None) -> FileHashes:
    """Hashes of a safetensors file or a pickle that is known to be intact. Raises as ``hash_file``.

    They are kept in the user's cache folder and used again while size and modification time of the file are unchanged.
    """
    status = path.stat()
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    stamp = f"{status.st_size} {status.st_mtime_ns}"
    memory = cache_folder() / "hashes" / f"{key}.json"
    try:
        entry = json.loads(memory.read_text(encoding="utf-8"))
        if entry.pop("stamp") == stamp:
            return FileHashes(**entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    payload_start = 0
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            payload_start = 8 + int.from_bytes(file.read(8), "little")
    hashes = hash_file(path, payload_start, progress)
    with suppress(OSError):  # Without the memory the next call is slower, nothing else.
        write_whole(memory, json.dumps({"stamp": stamp, **asdict(hashes)}).encode())
    return hashes


def legacy_hash(data: bytes) -> str:
    """``sshs_legacy_hash`` and AutoV1 of bytes: 64 KiB from 1 MiB on; ``e3b0c442`` for anything shorter."""
    return hashlib.sha256(data[_SLICE_START : _SLICE_START + _SLICE_LENGTH]).hexdigest()[:8]
