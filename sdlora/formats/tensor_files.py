"""Files of named tensors, opened without reading a weight, and read tensor by tensor into memory that is ready for them.

Safetensors, and pickles as far as ``torch.load(weights_only=True)`` trusts them.
"""

from __future__ import annotations

import mmap
import pickle
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import SdloraError
from .checkpoint_keys import Stored
from .safetensors_file import TensorInfo, read_header

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
READERS = 2
"""Threads: one converts while the other waits for the disk, or both convert."""
_PIECE = 1 << 20
"""Numbers that are converted at once: few enough to stay in a processor's cache (``benchmarks/real_size.py``)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorFile:
    """An open file's table of contents."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    payload_start: int
    """Offset in bytes of the first tensor; 0 in a pickle."""
    pickled: Mapping[str, Tensor] | None
    """Memory-mapped where the file allows it; None in a safetensors file."""


def open_tensor_file(path: Path, error: type[SdloraError]) -> TensorFile:
    """Read the table of contents of ``path``.

    Raises:
        error: the file is missing, damaged, of another kind, or a pickle that would execute code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror}") from None
    if start in (b"PK", b"\x80\x02") and path.suffix.lower() in PICKLES:
        return _open_pickle(path, error, is_zip=start == b"PK")
    header = read_header(path, error)
    return TensorFile(
        path=path,
        tensors=header.tensors,
        metadata=header.metadata,
        payload_start=header.payload_start,
        pickled=None,
    )


def _open_pickle(path: Path, error: type[SdloraError], *, is_zip: bool) -> TensorFile:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as fault:
        code = re.search(r"GLOBAL ([\w.]+)", str(fault))
        what = f"loading would execute {code[1]}" if code else "it holds more than tensors"
        raise error(f"{path}: {what}: refused. Convert it to safetensors in a sandbox") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as fault:
        raise error(f"{path}: damaged: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}") from None
    nested = content.get("state_dict") if isinstance(content, dict) else None
    tensors = {
        name: value.detach()
        for name, value in (
            nested if isinstance(nested, dict) else content if isinstance(content, dict) else {}
        ).items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise error(f"{path}: holds no named tensors")
    infos = {
        name: TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape), start=0, end=tensor.nbytes)
        for name, tensor in tensors.items()
    }
    step = content.get("global_step") if isinstance(content, dict) else None
    metadata = {"global_step": str(step)} if isinstance(step, int) else {}
    return TensorFile(path=path, tensors=infos, metadata=metadata, payload_start=0, pickled=tensors)


def mapped_tensors(file: TensorFile) -> Callable[[str], Tensor]:
    """Name -> tensor, on the CPU, read from the disk when it is used; writing to it changes no file.

    For the thousands of small tensors of a LoRA several times as fast as safetensors' reader.

    Raises:
        OSError: the file cannot be mapped.
    """
    if file.pickled is not None:
        return file.pickled.__getitem__
    with file.path.open("rb") as opened:
        mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(name: str) -> Tensor:
        info = file.tensors[name]
        count = (info.end - info.start) // info.dtype.itemsize
        if not count:
            return torch.empty(info.shape, dtype=info.dtype)
        offset = file.payload_start + info.start
        return torch.frombuffer(mapping, dtype=info.dtype, count=count, offset=offset).view(info.shape)

    return tensor


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A tensor to be read: its place in a file, and the shape to give it."""

    file: TensorFile
    stored: Stored
    shape: tuple[int, ...]

    @property
    def offset(self) -> int:
        """Offset in bytes of its first number in the file."""
        info = self.file.tensors[self.stored.name]
        third = (info.end - info.start) // 3 * (self.stored.third or 0)
        return self.file.payload_start + info.start + third


def read_tensors(wanted: Mapping[str, Wanted], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Read and convert every tensor, in the order of the files, with hardly more memory than the result needs.

    The result has the names of ``wanted``, their shapes, and ``dtype`` on ``device``.

    Raises:
        OSError: a file cannot be read, or has become shorter since it was opened.
    """
    order = sorted(wanted, key=lambda name: (str(wanted[name].file.path), wanted[name].offset))
    queue, lock = iter(order), threading.Lock()
    result: dict[str, Tensor] = {}

    def work() -> None:
        # The copies of one reader are single-threaded; there are as many readers as they can use.
        torch.set_num_threads(1)
        with _Reader() as reader:
            while True:
                with lock:
                    name = next(queue, None)
                if name is None:
                    return
                target = torch.empty(wanted[name].shape, dtype=dtype)
                reader.read(wanted[name], target)
                result[name] = target.to(device)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(READERS) as pool:
            for future in [pool.submit(work) for _ in range(READERS)]:
                future.result()
    finally:
        torch.set_num_threads(threads)
    return result


class _Reader:
    """The open file of a thread, and the buffers between it and the result."""

    def __init__(self) -> None:
        self._stream: BinaryIO | None = None
        self._path: Path | None = None
        self._bytes = torch.empty(_PIECE * 8, dtype=torch.uint8)
        self._floats = torch.empty(_PIECE, dtype=torch.float32)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def read(self, wanted: Wanted, target: Tensor) -> None:
        """Fill the contiguous ``target``."""
        if wanted.stored.transposed:
            upright = torch.empty(tuple(reversed(target.shape)), dtype=target.dtype)
            self._fill(wanted, upright.view(-1))
            target.copy_(upright.T)
        else:
            self._fill(wanted, target.view(-1))

    def _fill(self, wanted: Wanted, flat: Tensor) -> None:
        pickled, stored = wanted.file.pickled, wanted.stored
        if pickled is not None:
            source = pickled[stored.name]
            if stored.third is not None:
                source = source.chunk(3)[stored.third]
            flat.copy_(source.reshape(-1))
            return
        if self._path != wanted.file.path or self._stream is None:
            self.__exit__()
            self._stream, self._path = wanted.file.path.open("rb", buffering=0), wanted.file.path
        self._stream.seek(wanted.offset)
        dtype = wanted.file.tensors[stored.name].dtype
        if dtype == flat.dtype:
            _read_exactly(self._stream, flat)
            return
        for start in range(0, flat.numel(), _PIECE):
            piece = flat[start : start + _PIECE]
            raw = self._bytes[: piece.numel() * dtype.itemsize]
            _read_exactly(self._stream, raw)
            # By way of float32: torch converts to and from it with vector instructions, between others it does not.
            floats = self._floats[: piece.numel()]
            piece.copy_(floats.copy_(raw.view(dtype)))


def _read_exactly(stream: BinaryIO, flat: Tensor) -> None:
    view, position = memoryview(flat.view(torch.uint8).numpy()), 0
    while position < len(view):
        count = stream.readinto(view[position:])  # ty: ignore[missing-attribute]
        if not count:
            raise OSError(f"{stream.name}: ends before its last tensor")
        position += count
