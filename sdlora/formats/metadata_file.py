"""The metadata of any safetensors file: reading, and changing while the tensors stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ..errors import LoraFileError
from ..files import check_target, write_whole
from .hashes import legacy_hash
from .safetensors_file import TensorInfo, encode_header, read_header
from .safetensors_header import read_metadata as safetensors_metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata sorted by key. Raises ``LoraFileError`` if the file is missing, damaged or not safetensors."""
    return dict(sorted(safetensors_metadata(path, LoraFileError).items()))


def with_hashes(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], payload: bytes) -> dict[str, str]:
    """``metadata`` with the hashes over ``payload`` that other tools look for; ``tensors`` is the table of the payload."""
    digest = hashlib.sha256(payload).hexdigest()
    return {
        **metadata,
        "sshs_model_hash": digest,
        "sshs_legacy_hash": _legacy_hash(metadata, tensors, payload),
        "modelspec.hash_sha256": f"0x{digest}",
    }


def _legacy_hash(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], payload: bytes) -> str:
    """Kohya takes it over a file that holds the ``ss_*`` keys alone."""
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    return legacy_hash(encode_header(tensors, training) + payload)


def write_metadata(source: Path, target: Path, metadata: Mapping[str, str], *, hashes: bool = False) -> None:
    """Write ``source`` to ``target``, which may be the same file, with other metadata and the same bytes after the header.

    So every hash over the tensors stays valid. ``sshs_legacy_hash``, if ``metadata`` has it, is computed again; with
    ``hashes`` all hashes are written.

    Raises:
        LoraFileError: ``source`` is missing, damaged or not safetensors, or ``target`` is another file that exists.
        TargetError: ``target`` cannot be written.
    """
    check_target(target)
    if target.exists() and source.exists() and not target.samefile(source):
        raise LoraFileError(f"{target}: exists already; choose another name, or that of {source} itself")
    header = read_header(source, LoraFileError)
    payload = source.read_bytes()[header.payload_start :]
    metadata = dict(metadata)
    if hashes:
        metadata = with_hashes(metadata, header.tensors, payload)
    elif "sshs_legacy_hash" in metadata:
        metadata["sshs_legacy_hash"] = _legacy_hash(metadata, header.tensors, payload)
    write_whole(target, encode_header(header.tensors, metadata), payload)
