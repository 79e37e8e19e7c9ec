"""Hashes of the files of a library, and which files have equal tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from ..formats.hashes import file_hashes
from ..progress import Progress, Stop, raise_if_stopped
from .facts import TableFacts
from .index import Index, IndexedFile
from .scan import FoundFile

_SAMPLES, _SAMPLE = 8, 4096
"""Places in a file that are compared before all of it is, and bytes at each."""


def is_listed(file: IndexedFile, layouts: Mapping[str, TableFacts]) -> bool:
    """Whether it is a LoRA whose header was read without a problem."""
    layout = layouts.get(file.layout or "")
    return layout is not None and layout.is_lora


def hash_files(index: Index, files: Iterable[IndexedFile], progress: Progress, stop: Stop | None) -> list[IndexedFile]:
    """``files`` with their hashes; those that have none are read whole, and each hash is kept at once."""
    files = list(files)
    missing = [file for file in files if file.payload_sha256 is None]
    hashed = {}
    if missing:
        progress.start("Hashing", len(missing))
    for file in missing:
        raise_if_stopped(stop, "stopped while hashing; what was hashed is kept")
        try:
            hashes = file_hashes(Path(file.path))
        except OSError:  # It has gone since, or cannot be read.
            continue
        hashed[file.path] = replace(file, sha256=hashes.sha256, payload_sha256=hashes.payload_sha256)
        index.keep_hashes(hashed[file.path])
        progress.advance(note=Path(file.path).name)
    return [hashed.get(file.path, file) for file in files]


def equal_files(
    index: Index, folder: Path, found: Mapping[str, FoundFile], progress: Progress, stop: Stop | None
) -> tuple[tuple[str, ...], ...]:
    """Groups of LoRAs whose tensors are the same bytes, whatever the metadata, as paths within ``folder``.

    Only the hash over all tensors makes a group. Files whose tensors have other sizes, or differ at some sampled places,
    cannot be equal and are not hashed.
    """
    layouts = index.layouts()
    sizes: dict[int, list[IndexedFile]] = {}
    for file in index.files(folder):
        if file.path in found and is_listed(file, layouts):
            sizes.setdefault(layouts[file.layout or ""].payload_bytes, []).append(file)
    candidates = [file for size, files in sizes.items() if len(files) > 1 for file in _alike(files, size)]
    hashed = hash_files(index, candidates, progress, stop)
    by_hash = sorted((file.payload_sha256 or "", found[file.path].file) for file in hashed if file.payload_sha256)
    groups = [tuple(name for _, name in group) for _, group in groupby(by_hash, key=lambda pair: pair[0])]
    return tuple(sorted(group for group in groups if len(group) > 1))


def _alike(files: Sequence[IndexedFile], size: int) -> list[IndexedFile]:
    """Those that agree with another one at the sampled places of their last ``size`` bytes, the tensors."""
    samples: dict[bytes, list[IndexedFile]] = {}
    for file in files:
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open(file.path, "rb") as opened:
                start = file.stamp[0] - size
                for number in range(_SAMPLES):
                    opened.seek(start + number * max(0, size - _SAMPLE) // (_SAMPLES - 1))
                    digest.update(opened.read(_SAMPLE))
        except OSError:  # It has gone since, or cannot be read.
            continue
        samples.setdefault(digest.digest(), []).append(file)
    return [file for group in samples.values() if len(group) > 1 for file in group]
