"""A base checkpoint and LoRAs -> a checkpoint that draws as the two do together."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..base.checkpoint import BaseCheckpoint, base_path, find_base
from ..errors import BaseModelError, LoraFileError
from ..files import check_target, whole_file, whole_folder
from ..formats.safetensors_file import encode_header
from ..formats.tensor_files import PICKLES, TensorFile, Wanted
from ..generation.arguments import LoraArgument, constant_choices
from ..generation.loras import WeightedLora, fit_loras
from ..lora.change import Change
from ..lora.merging import merge_into
from ..progress import Progress, progress_or_bar

_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that hold a hash of what is changed."""
_ENDINGS = (".safetensors", *PICKLES)
"""How the name of a checkpoint file ends, and that of a folder does not."""
_PIECE = 1 << 24
"""Bytes of unchanged tensors that are in memory at once."""
_AT_ONCE = 1 << 20
"""Bytes of a call to write: with 16 MiB Linux takes several times as long for a large file."""


@dataclass(frozen=True, kw_only=True)
class Bake:
    """What was baked."""

    output: str
    family: str
    modules: int
    """Modules whose weights changed."""
    left_out: tuple[str, ...]
    """What the LoRAs hold and a checkpoint cannot, as sentences."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)


def bake(
    base: str | Path,
    loras: LoraArgument | Sequence[LoraArgument],
    target: str | Path,
    *,
    progress: Progress | None = None,
) -> Bake:
    """Write a copy of a checkpoint with the changes of LoRAs in its weights: W + Σ w · ΔW in float32, rounded once.

    All tensors keep their names and dtypes, and those that no LoRA changes keep their bytes, VAE and averaged weights
    included. The file is read and written in one pass, a tensor at a time.

    Args:
        base: ``mini``, a ``.safetensors`` checkpoint, or a diffusers folder; the target is of the same sort.
        loras: each ``FILE[:UNET[:TE]]``, a path or a ``LoraChoice``.
        progress: a bar on standard error by default.

    Raises:
        BaseModelError, LoraFileError, CompatibilityError: the base or a LoRA cannot be used, or the target exists. Nothing
            is written then.
    """
    target, choices = Path(target), constant_choices(loras)
    if not choices:
        raise LoraFileError("no LoRA file is named")
    with progress_or_bar(progress) as shown:
        checkpoint = find_base(str(base))
        _check(checkpoint, target)
        fitted = fit_loras(checkpoint, choices)
        places, left_out = _places(checkpoint, fitted)
        shown.start("Baking", sum(map(len, places.values())))
        if checkpoint.file is not None:
            (file,) = places
            with whole_file(target) as partial:
                _write(file, partial, places[file], _metadata(file, fitted), shown)
        else:
            _bake_folder(base_path(base), target, places, fitted, shown)
    return Bake(
        output=str(target),
        family=checkpoint.family.name,
        modules=len({name for lora in fitted for name in lora.fitted.modules}),
        left_out=(*(problem for lora in fitted for problem in lora.fitted.file.problems), *left_out),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Patch:
    """One of our tensors within a stored one, and what is added to it."""

    wanted: Wanted
    changes: tuple[tuple[Change, float], ...] = ()
    bias: tuple[tuple[Tensor, float], ...] = ()


Places = Mapping[TensorFile, Mapping[str, Sequence[_Patch]]]
"""File -> stored tensor -> what changes in it."""


def _places(base: BaseCheckpoint, loras: Sequence[WeightedLora]) -> tuple[Places, list[str]]:
    """Where the changes go, and a sentence on each that has no place."""
    places: dict[TensorFile, dict[str, list[_Patch]]] = defaultdict(lambda: defaultdict(list))
    every = {part: content.tensors for part, content in base.parts.items()}
    for tensors in every.values():
        for wanted in tensors.values():
            places[wanted.file]
    changes = [lora.changes() for lora in loras]
    lost = [
        f"embedding {name} of {lora.choice.name}: a checkpoint has no place for it"
        for lora in loras
        for name in lora.fitted.file.embeddings
    ]
    for name in sorted({name for each in changes for name in each}):
        part, _, path = name.partition(".")
        found = tuple(each[name] for each in changes if name in each)
        weight = every[part][f"{path}.weight"]
        places[weight.file][weight.stored.name].append(_Patch(wanted=weight, changes=found))
        moves = tuple((move, strength) for change, strength in found if (move := change.bias_delta()) is not None)
        bias = every[part].get(f"{path}.bias")
        if moves and bias is None:
            lost.append(f"the bias of {name}: the checkpoint's layer has none")
        elif moves and bias is not None:
            places[bias.file][bias.stored.name].append(_Patch(wanted=bias, bias=moves))
    return places, lost


def _check(base: BaseCheckpoint, target: Path) -> None:
    files = {wanted.file for part in base.parts.values() for wanted in part.tensors.values()}
    pickles = sorted(str(file.path) for file in files if file.pickled is not None)
    if pickles:
        raise BaseModelError([f"{path}: a pickle; convert the checkpoint to safetensors first" for path in pickles])
    if base.file is not None and target.suffix != ".safetensors":
        raise LoraFileError(f"{target}: the name of the checkpoint to write must end in .safetensors")
    if base.file is None and target.suffix in _ENDINGS:
        raise LoraFileError(
            f"{target}: the base is a folder, and so is its copy; leave {target.suffix} out of the name"
        )
    if target.exists() and not (base.file is None and target.is_dir() and not any(target.iterdir())):
        raise LoraFileError(f"{target}: exists already; choose another name")
    check_target(target, "file" if base.file is not None else "new folder")


def _bake_folder(source: Path, target: Path, places: Places, loras: Sequence[WeightedLora], progress: Progress) -> None:
    written = {file.path.resolve(): file for file in places}
    with whole_folder(target) as partial:
        for path in sorted(source.rglob("*")):
            copy = partial / path.relative_to(source)
            file = written.get(path.resolve())
            if path.is_dir():
                copy.mkdir(exist_ok=True)
            elif file is not None and places[file]:
                _write(file, copy, places[file], _metadata(file, loras), progress)
            else:
                shutil.copyfile(path, copy)


def _write(
    file: TensorFile,
    copy: Path,
    patches: Mapping[str, Sequence[_Patch]],
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    """Write ``file`` to ``copy`` in one pass, with other metadata and the changed tensors.

    While a thread writes one buffer, the next is read and changed in the other.
    """
    spans = _spans(file, patches)
    size = max((end - start for start, end, _ in spans), default=0)
    buffers = itertools.cycle((bytearray(size), bytearray(size)))
    with file.path.open("rb") as source, copy.open("wb") as output, ThreadPoolExecutor(1) as writing:
        written = writing.submit(_write_all, output, memoryview(encode_header(file.tensors, metadata)))
        source.seek(file.payload_start)
        for start, end, name in spans:
            buffer = memoryview(next(buffers))[: end - start]
            if source.readinto(buffer) < len(buffer):
                raise BaseModelError([f"{file.path}: was shortened while it was read"])
            if name is not None:
                info = file.tensors[name]
                _patch(torch.frombuffer(buffer, dtype=info.dtype).view(info.shape), patches[name])
                progress.advance()
            written.result()
            written = writing.submit(_write_all, output, buffer)
        written.result()


def _write_all(output: BinaryIO, data: memoryview) -> None:
    for start in range(0, len(data), _AT_ONCE):
        output.write(data[start : start + _AT_ONCE])


def _spans(file: TensorFile, patches: Mapping[str, Sequence[_Patch]]) -> list[tuple[int, int, str | None]]:
    """(start, end, name) of every byte of the payload, in order: changed tensors by name, and pieces of what is between."""
    spans: list[tuple[int, int, str | None]] = []
    places = sorted((file.tensors[name].start, file.tensors[name].end, name) for name in patches)
    last, position = max((info.end for info in file.tensors.values()), default=0), 0
    for start, end, name in [*places, (last, last, None)]:
        spans += [(at, min(at + _PIECE, start), None) for at in range(position, start, _PIECE)]
        if end > start:
            spans.append((start, end, name))
        position = end
    return spans


@torch.no_grad()
def _patch(stored: Tensor, patches: Sequence[_Patch]) -> None:
    """Make all changes of the layers that a stored tensor holds, in its memory and dtype."""
    for patch in patches:
        place = patch.wanted.stored
        view = stored if place.third is None else stored.chunk(3)[place.third]
        view = view.T if place.transposed else view
        ours = view.reshape(patch.wanted.shape)
        if patch.bias:
            total = ours.float()
            for move, strength in patch.bias:
                total = total + strength * move.float().reshape(total.shape)
            ours.copy_(total)
        else:
            merge_into(ours, ours, patch.changes)
        if ours.data_ptr() != view.data_ptr():
            view.copy_(ours.reshape(view.shape))


def _metadata(file: TensorFile, loras: Sequence[WeightedLora]) -> dict[str, str]:
    """The file's own without hashes of what has changed, and what was baked into it: names and weights, no paths."""
    recipe = [
        {
            "name": lora.choice.name,
            "unet": lora.choice.unet,
            "text_encoder": lora.choice.text_encoder,
            "autov3": lora.fitted.autov3,
        }
        for lora in loras
    ]
    kept = {key: value for key, value in file.metadata.items() if key not in _STALE}
    return kept | {"sdlora_bake": json.dumps([*_baked_earlier(file.metadata), *recipe], sort_keys=True)}


def _baked_earlier(metadata: Mapping[str, str]) -> list[Any]:
    try:
        earlier = json.loads(metadata.get("sdlora_bake", "[]"))
    except (ValueError, RecursionError):
        return []
    return earlier if isinstance(earlier, list) else []
