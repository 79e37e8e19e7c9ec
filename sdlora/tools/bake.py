"""A base checkpoint and LoRAs -> a checkpoint that draws as the two do together."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.checkpoint import MINI, MINI_FOLDER, BaseCheckpoint, find_base
from ..errors import BaseModelError, LoraFileError
from ..files import check_target, whole_file, whole_folder
from ..formats.safetensors_file import encode_header
from ..formats.tensor_files import TensorFile, Wanted, mapped_tensors
from ..generation.arguments import LoraArgument, constant_choices
from ..generation.loras import WeightedLora, fit_loras
from ..lora.change import Change
from ..lora.merging import merged_weight
from ..progress import Progress, progress_or_bar

_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that hold a hash of what is changed."""
_PIECE = 1 << 26


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
    included. The file is copied, and changed tensors are written over the copy, one layer at a time.

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
            _bake_folder(MINI_FOLDER if str(base) == MINI else Path(base), target, places, fitted, shown)
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
    """Copy ``file`` to ``copy`` with other metadata, then write the changed tensors over the copied ones."""
    header = encode_header(file.tensors, metadata)
    pristine = mapped_tensors(file)
    with file.path.open("rb") as source, copy.open("wb") as output:
        output.write(header)
        source.seek(file.payload_start)
        shutil.copyfileobj(source, output, _PIECE)
        for name, found in sorted(patches.items(), key=lambda entry: file.tensors[entry[0]].start):
            changed = _patched(pristine(name), found)
            output.seek(len(header) + file.tensors[name].start)
            output.write(memoryview(changed.contiguous().view(-1).view(torch.uint8).numpy()))
            progress.advance()


@torch.no_grad()
def _patched(stored: Tensor, patches: Sequence[_Patch]) -> Tensor:
    """A stored tensor with all changes of the layers that it holds, of its dtype."""
    result = stored.clone()
    for patch in patches:
        place = patch.wanted.stored
        view = result if place.third is None else result.chunk(3)[place.third]
        view = view.T if place.transposed else view
        ours = view.reshape(patch.wanted.shape)
        if patch.bias:
            total = ours.float()
            for move, strength in patch.bias:
                total = total + strength * move.float().reshape(total.shape)
        else:
            total = merged_weight(ours, patch.changes)
        view.copy_(total.to(stored.dtype).reshape(view.shape))
    return result


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
