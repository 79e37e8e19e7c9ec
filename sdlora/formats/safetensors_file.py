"""Safetensors files: a checked header, and bytes that are the same every time.

The reference writer orders metadata as its hash map does; ours sorts metadata and tensors by name, so equal content
is equal bytes. Files appear whole or not at all.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import SdloraError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference reader."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """``start`` and ``end`` are byte offsets from the first byte after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the header of a file states."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    payload_start: int
    """Offset in bytes of the first tensor."""


METADATA_FIRST = b'{"__metadata__":'
"""How the header begins in files of safetensors, kohya and diffusers: the table need not be parsed to reach what follows."""


def read_header(path: Path, error: type[SdloraError]) -> Header:
    """Read and check the header of ``path``; no tensor is read.

    Raises:
        error: the file is missing, truncated or not safetensors; the message names it and what is wrong.
    """
    raw, size = _read_raw_header(path, error)
    table, metadata = _parse(path, raw, error)
    try:
        tensors = {name: _tensor_info(entry) for name, entry in table.items()}
    except _HeaderFaultError as fault:
        raise error(f"{path}: damaged: {fault}") from None
    except (ValueError, TypeError, KeyError):
        raise error(f"{path}: not a safetensors file: its header cannot be parsed") from None
    payload, position = size - 8 - len(raw), 0
    for name, info in sorted(tensors.items(), key=lambda entry: (entry[1].start, entry[1].end)):
        count = 1
        for extent in info.shape:
            count *= extent
        if info.start != position or info.end - info.start != count * info.dtype.itemsize:
            raise error(f"{path}: damaged: the bytes of tensor {name} do not fit its shape or its neighbours")
        position = info.end
    if position != payload:
        what = f"{position - payload:,} bytes are missing" if position > payload else "bytes are left over"
        raise error(f"{path}: truncated or damaged: {what} at its end")
    return Header(tensors=tensors, metadata=metadata, payload_start=8 + len(raw))


def read_metadata(path: Path, error: type[SdloraError]) -> dict[str, str]:
    """The metadata alone, without a look at the tensors' table: to list many files fast. Raises as ``read_header``."""
    raw, _ = _read_raw_header(path, error)
    if raw.startswith(METADATA_FIRST) and raw.count(b'"__metadata__"') == 1 and raw.rstrip().endswith(b"}"):
        try:
            metadata, _ = json.JSONDecoder().raw_decode(raw[len(METADATA_FIRST) :].decode("utf-8"))
        except (ValueError, RecursionError):
            metadata = None
        if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
            return metadata
    return _parse(path, raw, error)[1]


def _read_raw_header(path: Path, error: type[SdloraError]) -> tuple[bytes, int]:
    """The header's text, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise error(f"{path}: not a safetensors file: only {len(prefix)} bytes long")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise error(f"{path}: not a safetensors file, or truncated: its header would end after its last byte")
            return file.read(length), size
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror}") from None


def _parse(path: Path, raw: bytes, error: type[SdloraError]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors' table, unchecked, and the metadata."""
    try:
        table = json.loads(raw)
        if raw.count(b'"data_offsets"') != len(table) - ("__metadata__" in table):
            # Names that occur twice, as a rule; looking at every pair takes several times as long.
            table = json.loads(raw, object_pairs_hook=_without_duplicates)
        metadata = table.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError
    except _HeaderFaultError as fault:
        raise error(f"{path}: damaged: {fault}") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise error(f"{path}: not a safetensors file: its header cannot be parsed") from None
    return table, metadata


class _HeaderFaultError(Exception):
    """A header that parses and cannot be right; the text says what is wrong."""


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise _HeaderFaultError(f"its header names {names.most_common(1)[0][0]!r:.200} twice")
    return table


def _tensor_info(entry: Mapping) -> TensorInfo:
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError
    if entry["dtype"] not in _DTYPES:
        raise _HeaderFaultError(f"its header names an unknown dtype {entry['dtype']!r:.40}")
    return TensorInfo(dtype=_DTYPES[entry["dtype"]], shape=shape, start=start, end=end)


def lay_out(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, TensorInfo], bytes]:
    """The tensors' table, sorted by name, and the payload that it describes."""
    table: dict[str, TensorInfo] = {}
    chunks, position = [], 0
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        shape, end = tuple(tensor.shape), position + len(data)
        table[name] = TensorInfo(dtype=tensor.dtype, shape=shape, start=position, end=end)
        chunks.append(data)
        position = end
    return table, b"".join(chunks)


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """All bytes before the payload: the length of the header, and the header."""
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, info in tensors.items():
        offsets = [info.start, info.end]
        table[name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def serialise(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
    """(header, payload) of a safetensors file, which is the two in this order."""
    table, payload = lay_out(tensors)
    return encode_header(table, metadata), payload
