"""The header of a safetensors file, read and checked without torch, so that many files can be listed at once."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from ..errors import SdloraError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference reader."""
DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
"""Name of a dtype in a header -> bytes of one number."""
METADATA_FIRST = b'{"__metadata__":'
"""How the header begins in files of safetensors, kohya and diffusers: the table need not be parsed to reach what follows."""

_ENTRY = re.compile(r',"([^"\\\x00-\x1f]+)":\{("dtype":"[^]]+\]),"data_offsets":\[([0-9]+,[0-9]+)\]\}')
"""An entry of the table as safetensors and kohya write it: name, dtype and shape, start and end."""
_AROUND = len(',"":{,"data_offsets":[]}')
"""Characters of an entry outside of its three groups."""
_PIECE = 1 << 16
"""Bytes in which the end of the metadata is looked for first."""
_PADDING = 64
"""Spaces that a header may end in; the format asks for no more than 7."""


@dataclass(frozen=True, kw_only=True)
class RawHeader:
    """The text of a header, and the size of its file in bytes."""

    text: bytes
    file_bytes: int

    @property
    def payload_start(self) -> int:
        """Offset in bytes of the first tensor."""
        return 8 + len(self.text)

    @property
    def payload_bytes(self) -> int:
        """Bytes after the header."""
        return self.file_bytes - self.payload_start


@dataclass(frozen=True, kw_only=True)
class TensorForm:
    """A tensor as a header describes it, without its place."""

    dtype: str
    """As the header spells it, such as ``F16``."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TensorTable:
    """What a header says, but for the places of its tensors."""

    tensors: Mapping[str, TensorForm]
    """By name."""
    metadata: Mapping[str, str]
    payload_bytes: int
    """Bytes of all tensors."""


def read_raw_header(path: Path, error: type[SdloraError]) -> RawHeader:
    """Read the header's text. Raises ``error`` if the file is missing, or too short to be safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise error(f"{path}: not a safetensors file: only {len(prefix)} bytes long")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise error(f"{path}: not a safetensors file, or truncated: its header would end after its last byte")
            return RawHeader(text=file.read(length), file_bytes=size)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror}") from None


def split_header(raw: RawHeader) -> tuple[dict[str, str], memoryview] | None:
    """The metadata and the text after them, where the metadata come first, as most programs write them; else None.

    What follows is neither parsed nor copied. Files with tensors of the same names, shapes and places have the same bytes
    there.
    """
    text = raw.text
    if not text.startswith(METADATA_FIRST) or text.count(b'"__metadata__"') != 1:
        return None
    padding = len(text[-_PADDING:]) - len(text[-_PADDING:].rstrip())
    if text[len(text) - padding - 1 : len(text) - padding] != b"}":
        return None
    start = len(METADATA_FIRST)
    # Metadata are a small part of the text as a rule; a piece that ends in their middle does not parse.
    for end in (text.rfind(b'"', start, start + _PIECE) + 1, len(text)):
        try:
            piece = text[start:end].decode("utf-8")
            metadata, length = json.JSONDecoder().raw_decode(piece)
        except (ValueError, RecursionError):
            continue
        if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
            # The place in bytes is further on than that in letters where some of these take several.
            length = length if piece.isascii() else len(piece[:length].encode("utf-8"))
            return metadata, memoryview(text)[start + length : len(text) - padding]
        return None
    return None


def parse_header(path: Path, raw: RawHeader, error: type[SdloraError]) -> tuple[dict[str, Any], dict[str, str]]:
    """The table of tensors, checked, and the metadata.

    An entry of the table has ``dtype``, ``shape`` and ``data_offsets``, as the file states them.

    Raises:
        error: it is not the header of a safetensors file, or does not fit the size of the file.
    """
    table, metadata = _parsed(path, raw.text, error)
    try:
        extents = sorted((*_extent(entry), name) for name, entry in table.items())
    except _HeaderFaultError as fault:
        raise error(f"{path}: damaged: {fault}") from None
    except (ValueError, TypeError, KeyError):
        raise error(f"{path}: not a safetensors file: its header cannot be parsed") from None
    position = 0
    for start, end, count, name in extents:
        if start != position or end - start != count:
            raise error(f"{path}: damaged: the bytes of tensor {name} do not fit its shape or its neighbours")
        position = end
    check_payload(path, raw, position, error)
    return table, metadata


def read_table(path: Path, raw: RawHeader, error: type[SdloraError]) -> TensorTable:
    """What ``parse_header`` reads, but for places; in half the time where the header is written as most programs do.

    Raises:
        error: as ``parse_header``.
    """
    split = split_header(raw)
    plain = None if split is None else _plain_table(split[1])
    if split is None or plain is None:
        entries, metadata = parse_header(path, raw, error)
        tensors = {n: TensorForm(dtype=e["dtype"], shape=tuple(e["shape"])) for n, e in entries.items()}
        return TensorTable(tensors=tensors, metadata=metadata, payload_bytes=raw.payload_bytes)
    tensors, payload_bytes = plain
    check_payload(path, raw, payload_bytes, error)
    return TensorTable(tensors=tensors, metadata=split[0], payload_bytes=payload_bytes)


def _plain_table(text: memoryview) -> tuple[dict[str, TensorForm], int] | None:
    """The table in ``text``, which follows the metadata, and the bytes of its tensors.

    None where it is not written as most programs do, without spaces and in the order of the places; that says nothing
    against it: ``parse_header`` reads every header, and says what is wrong with one. This is fast since no entry becomes
    objects of its own: names and places are compared as whole lists, and the forms in a file are few.
    """
    try:
        entries = str(text, "utf-8").removesuffix("}")
        found = _ENTRY.findall(entries)
        names, forms, places = zip(*found, strict=True) if found else ((), (), ())
        read = [_form(form) for form in forms]
        offsets = json.loads(f"[{','.join(places)}]")
    except (ValueError, TypeError, KeyError, RecursionError, _HeaderFaultError):
        return None
    letters = sum(map(len, chain(names, forms, places))) + _AROUND * len(found)
    ends = list(accumulate((size for _, size in read), initial=0))
    # Nothing but entries, no name twice, and each tensor begins where the one before it ends.
    if letters != len(entries) or len(set(names)) != len(names):
        return None
    if offsets[::2] != ends[:-1] or offsets[1::2] != ends[1:]:
        return None
    return dict(zip(names, (form for form, _ in read), strict=True)), ends[-1]


@lru_cache(maxsize=4096)
def _form(text: str) -> tuple[TensorForm, int]:
    """Dtype and shape from their text, and the bytes that they need. Raises as ``_extent``, and ``ValueError``."""
    entry = json.loads(f"{{{text}}}")
    _, _, size = _extent(entry | {"data_offsets": (0, 0)})
    return TensorForm(dtype=entry["dtype"], shape=tuple(entry["shape"])), size


def check_payload(path: Path, raw: RawHeader, table_end: int, error: type[SdloraError]) -> None:
    """Raise ``error`` unless the tensors, which end ``table_end`` bytes after the header, are all of the file."""
    payload = raw.payload_bytes
    if table_end != payload:
        what = f"{table_end - payload:,} bytes are missing" if table_end > payload else "bytes are left over"
        raise error(f"{path}: truncated or damaged: {what} at its end")


def read_metadata(path: Path, error: type[SdloraError]) -> dict[str, str]:
    """The metadata alone, without a look at the tensors' table: to list many files fast.

    Raises:
        error: the file is missing, or its header cannot be parsed.
    """
    raw = read_raw_header(path, error)
    split = split_header(raw)
    return _parsed(path, raw.text, error)[1] if split is None else split[0]


def _parsed(path: Path, text: bytes, error: type[SdloraError]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors' table, unchecked, and the metadata."""
    try:
        table = json.loads(text)
        if text.count(b'"data_offsets"') != len(table) - ("__metadata__" in table):
            # Names that occur twice, as a rule; looking at every pair takes several times as long.
            table = json.loads(text, object_pairs_hook=_without_duplicates)
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


def _extent(entry: Mapping[str, Any]) -> tuple[int, int, int]:
    """Start and end of a tensor, in bytes from the first after the header, and the bytes that its shape needs."""
    shape = entry["shape"]
    start, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError
    if entry["dtype"] not in DTYPE_BYTES:
        raise _HeaderFaultError(f"its header names an unknown dtype {entry['dtype']!r:.40}")
    return start, end, math.prod(shape) * DTYPE_BYTES[entry["dtype"]]
