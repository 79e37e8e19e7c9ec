"""Safetensors files: a checked header, and bytes that are the same every time.

The reference writer orders metadata as its hash map does; ours sorts metadata and tensors by name, so equal content
is equal bytes. Files appear whole or not at all.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import SdloraError
from .safetensors_header import parse_header, read_raw_header

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


def read_header(path: Path, error: type[SdloraError]) -> Header:
    """Read and check the header of ``path``; no tensor is read.

    Raises:
        error: the file is missing, truncated or not safetensors; the message names it and what is wrong.
    """
    raw = read_raw_header(path, error)
    table, metadata = parse_header(path, raw, error)
    tensors = {name: _tensor_info(entry) for name, entry in table.items()}
    return Header(tensors=tensors, metadata=metadata, payload_start=raw.payload_start)


def _tensor_info(entry: Mapping[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(dtype=_DTYPES[entry["dtype"]], shape=tuple(entry["shape"]), start=start, end=end)


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
