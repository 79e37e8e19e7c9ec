"""The metadata of any safetensors file: reading, changing (the tensors stay as they are), removing paths."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraFileError
from ..files import check_target, write_whole
from .hashes import legacy_hash
from .safetensors_file import TensorInfo, encode_header, read_header
from .safetensors_file import read_metadata as safetensors_metadata

_WHOLE_PATH = re.compile(r"\s*(?:[A-Za-z]:[\\/]|[\\/]|~[\\/]).*[^\s]", re.DOTALL)
_PATH_WITHIN = re.compile(r"(?<![\w:/\\.])(?:[A-Za-z]:[\\/]|\\\\|~?/)(?:[^\\/\s\"',;:<>|]+[\\/])+([^\\/\s\"',;:<>|]*)")
_ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+")


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
        LoraFileError: ``source`` is missing, damaged or not safetensors.
        TargetError: ``target`` cannot be written.
    """
    check_target(target)
    header = read_header(source, LoraFileError)
    payload = source.read_bytes()[header.payload_start :]
    metadata = dict(metadata)
    if hashes:
        metadata = with_hashes(metadata, header.tensors, payload)
    elif "sshs_legacy_hash" in metadata:
        metadata["sshs_legacy_hash"] = _legacy_hash(metadata, header.tensors, payload)
    write_whole(target, encode_header(header.tensors, metadata), payload)


def redacted(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same metadata without folders and mail addresses; only the last name of a path stays, also within JSON."""
    return {key: _redacted_value(value) for key, value in metadata.items()}


def _redacted_value(value: str) -> str:
    if value.lstrip().startswith(("{", "[")):
        try:
            return json.dumps(_redacted_tree(json.loads(value)), ensure_ascii=False)
        except (ValueError, RecursionError):
            pass
    return _redacted_text(value)


def _redacted_tree(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {_redacted_text(key): _redacted_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_redacted_tree(value) for value in tree]
    return _redacted_text(tree) if isinstance(tree, str) else tree


def _redacted_text(text: str) -> str:
    if "://" in text or text.startswith("data:"):
        return _ADDRESS.sub("", text) if not text.startswith("data:") else text
    if _WHOLE_PATH.fullmatch(text) and "\n" not in text:
        return re.split(r"[\\/]", text.rstrip().rstrip("\\/"))[-1]
    return _ADDRESS.sub("", _PATH_WITHIN.sub(r"\1", text))
