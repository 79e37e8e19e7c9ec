"""UNet, VAE and text encoders in files and folders: our names of their tensors, and the places of those."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import BaseModelError
from ..families import FAMILIES, PART_TITLES, PARTS
from ..formats.checkpoint_keys import (
    Stored,
    Table,
    clip_table_from_open_clip,
    clip_table_from_transformers,
    unet_table_from_ldm,
    vae_table_from_diffusers,
    vae_table_from_ldm,
)
from ..formats.tensor_files import TensorFile, Wanted, open_tensor_file

_LDM_PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    **{
        prefix: facts.part
        for family in FAMILIES.values()
        for facts in family.text_encoders
        for prefix in facts.prefixes
    },
}
_DIFFUSERS_PREFIXES = {f"{part}.": part for part in PARTS}
_UNREAD_LAYERS = {
    prefix: facts.unread_layers
    for family in FAMILIES.values()
    for facts in family.text_encoders
    for prefix in facts.prefixes
}
_BARE = {
    "unet": ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.norm1.weight"),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight"),
    "text_encoder": ("text_model.final_layer_norm.weight", "ln_final.weight", "final_layer_norm.weight"),
}
"""Tensors by which a file is recognised that holds a single part, under names without a prefix."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One of ``PARTS``: our names of its tensors, and their places in files."""

    tensors: Mapping[str, Wanted]
    config: Mapping[str, Any] | None
    """The ``config.json`` beside it, in a diffusers folder."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our name -> shape of the tensor."""
        return {name: wanted.shape for name, wanted in self.tensors.items()}

    def dtypes(self) -> Counter[torch.dtype]:
        """Number of the stored parameters of each dtype."""
        counts: Counter[torch.dtype] = Counter()
        for wanted in self.tensors.values():
            counts[wanted.file.tensors[wanted.stored.name].dtype] += math.prod(wanted.shape)
        return counts

    def count(self, pattern: str) -> int:
        """Number of different values of the first group of ``pattern``, matched at the start of the names."""
        return len({match[1] for name in self.tensors if (match := re.match(pattern, name))})

    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(wanted.shape) for wanted in self.tensors.values())

    def digest(self) -> bytes:
        """Hash over names, shapes, configuration and samples of the bytes."""
        digest = hashlib.sha256(json.dumps([self.config, sorted(self.shapes().items())], sort_keys=True).encode())
        ordered = sorted(self.tensors.values(), key=lambda wanted: (str(wanted.file.path), wanted.offset))
        for wanted in ordered[:: max(1, len(ordered) // 16)]:
            if wanted.file.pickled is not None:
                digest.update(wanted.file.pickled[wanted.stored.name].reshape(-1)[:1024].float().numpy().tobytes())
                continue
            with wanted.file.path.open("rb") as stream:
                stream.seek(wanted.offset)
                digest.update(stream.read(4096))
        return digest.digest()


def parts_in_file(file: TensorFile) -> tuple[dict[str, Part], str]:
    """Every part that a file holds, under whatever prefixes, and its format (``DetectedCheckpoint.format``)."""
    for prefixes, form in ((_LDM_PREFIXES, "ldm"), (_DIFFUSERS_PREFIXES, "diffusers-single-file")):
        parts: dict[str, Part] = {}
        for prefix, part in prefixes.items():
            names = [name for name in file.tensors if name.startswith(prefix)]
            if names and part not in parts:
                parts[part] = _part(part, file, names, prefix=prefix, unread_layers=_UNREAD_LAYERS.get(prefix, 0))
        if parts:
            return parts, "unet-only" if set(parts) == {"unet"} else form
    for part, markers in _BARE.items():
        if any(marker in file.tensors for marker in markers):
            return {part: _part(part, file, list(file.tensors))}, "unet-only" if part == "unet" else part
    return {}, "unknown"


def part_in_folder(folder: Path, part: str) -> Part:
    """The part in its folder of a diffusers checkpoint; of several variants the unmarked (not ``fp16`` and the like).

    Raises:
        BaseModelError: no configuration or no weights there, or damaged ones.
    """
    stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "(?:pytorch_)?model"
    config = read_json(folder / "config.json")
    for suffix in ("safetensors", "bin"):
        variants: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            if match := re.fullmatch(rf"{stem}(?:\.(?!index)(\w+))?(?:-\d+-of-\d+)?\.{suffix}", path.name):
                variants.setdefault(match[1] or "", []).append(path)
        if variants:
            tensors: dict[str, Wanted] = {}
            for path in variants[min(variants)]:
                shard = open_tensor_file(path, BaseModelError)
                tensors |= _part(part, shard, list(shard.tensors)).tensors
            return Part(tensors=tensors, config=config)
    raise BaseModelError(f"{folder}: holds no weights; expected a .safetensors file")


def find_part(path: Path, part: str, *, unread_layers: int) -> Part:
    """One part alone, out of a file or folder that holds it, whatever else that holds.

    ``unread_layers`` is how many of a text encoder's last layers the base does not read, where the file has them all.

    Raises:
        BaseModelError: it is not there.
    """
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / part
        if folder.is_dir():
            return part_in_folder(folder, part)
        raise BaseModelError(f"{path}: holds no {PART_TITLES[part]}")
    if not path.exists():
        raise BaseModelError(f"{path}: no such file or folder; expected a {PART_TITLES[part]}")
    file = open_tensor_file(path, BaseModelError)
    if part.startswith("text_encoder") and any(marker in file.tensors for marker in _BARE["text_encoder"]):
        # Alone, an encoder does not say whether it is a base's first or second.
        return _part(part, file, list(file.tensors), unread_layers=unread_layers)
    found, _ = parts_in_file(file)
    if part not in found:
        raise BaseModelError(f"{path}: holds no {PART_TITLES[part]}")
    return found[part]


def read_json(file: Path, *, needed: bool = True) -> dict[str, Any]:
    """The object in ``file``; empty where it is missing and not ``needed``. Raises ``BaseModelError``."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not needed:
            return {}
        raise BaseModelError(f"{file}: missing from the checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise BaseModelError(f"{file}: expected a JSON object")
    return content


def _part(part: str, file: TensorFile, names: Sequence[str], *, prefix: str = "", unread_layers: int = 0) -> Part:
    table = _table(part, {name.removeprefix(prefix) for name in names}, unread_layers)
    tensors = {}
    for ours, stored in table.items():
        whole = Stored(name=prefix + stored.name, third=stored.third, transposed=stored.transposed)
        shape = _shape(file.tensors[whole.name].shape, whole)
        # LDM's VAE attends with 1 x 1 convolutions where diffusers has linear layers.
        if part == "vae" and ".attentions." in ours and len(shape) == 4:
            shape = shape[:2]
        tensors[ours] = Wanted(file=file, stored=whole, shape=shape)
    return Part(tensors=tensors, config=None)


def _table(part: str, names: set[str], unread_layers: int) -> Table:
    if part == "unet":
        ldm = "input_blocks.0.0.weight" in names
        return unet_table_from_ldm(names) if ldm else {name: Stored(name=name) for name in names}
    if part == "vae":
        ldm = any(name.startswith(("encoder.down.", "decoder.up.")) for name in names)
        return vae_table_from_ldm(names) if ldm else vae_table_from_diffusers(names)
    if "token_embedding.weight" in names:
        return clip_table_from_open_clip(names, unread_layers=unread_layers)
    return clip_table_from_transformers(names)


def _shape(stored: tuple[int, ...], place: Stored) -> tuple[int, ...]:
    if place.third is not None and stored:
        return (stored[0] // 3, *stored[1:])
    return tuple(reversed(stored)) if place.transposed else stored
