"""Changes of a base's modules as a LoRA file in one of the formats that other tools read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraFileError
from ..families import LORA_PARTS, SD1, Family
from ..files import write_whole
from ..lora.change import Change
from ..lora.kinds import Decomposed
from ..lora.low_rank import LowRank
from .keys import NESTING, kohya_keys
from .lora_file import read_lora
from .lora_tensors import is_finite
from .metadata_file import with_hashes
from .readers import lost_elsewhere
from .safetensors_file import TensorInfo, encode_header, lay_out

WRITTEN_FORMATS = ("kohya", "diffusers", "peft")


def write_lora(
    path: Path,
    modules: Mapping[str, Change],
    metadata: Mapping[str, str] | None,
    *,
    dtype: torch.dtype,
    format: str = "kohya",
    family: Family = SD1,
    base_modules: Mapping[str, tuple[int, ...]] | None = None,
    bundled: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``modules`` (canonical name -> change) with their alphas and the hashes of the final bytes.

    In the formats of diffusers and PEFT alpha is the rank, and the scale is in ``up``, or where that is out of the range of
    float16 in both matrices: exact where it is a power of two.

    The same content gives the same bytes.

    Args:
        metadata: None for a file that states nothing, not even its hashes, except what ``format`` needs.
        dtype: of all tensors in the file that hold floating-point numbers.
        format: one of ``WRITTEN_FORMATS``.
        base_modules: canonical name -> shape of the weight, of the whole base. Kohya's format needs it to name SDXL's
            blocks, and to complete attention in text encoders that A1111 reads as open_clip's: there it applies a layer
            only if q, k, v and out are all in the file, so missing ones are added with a change of zero.
        bundled: the tensors of embeddings, for kohya's format alone: one of them makes diffusers refuse a file.

    Raises:
        LoraFileError: the format cannot hold a module's kind, or the kinds of a part together, or kohya's tools, ComfyUI
            or diffusers would not know its name, or a value is NaN, Inf or too large for ``dtype`` (nothing is written
            then); or the file, read back, lacks a module.
    """
    if format == "kohya":
        modules = _with_whole_attention(modules, family, base_modules or {})
        tensors, described = _kohya(modules, family, base_modules or {}) | dict(bundled or {}), {}
    else:
        modules = _all_or_none_dora(modules, format)
        tensors = _peft(modules, format, dtype)
        described = {"format": "pt", "lora_adapter_metadata": _adapter_metadata(modules)}
    rounded = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    _check_finite(path, tensors, rounded)
    described = {**(metadata or {}), **described}
    table, payload = lay_out(rounded)
    if metadata is not None:
        described = with_hashes(described, table, payload)
    write_whole(path, encode_header(table, described), payload)
    again = read_lora(path)
    if len(again.modules) != len(modules) or again.problems:
        raise LoraFileError(
            f"{path}: not every module can be read back: {'; '.join(again.problems) or 'some are missing'}"
        )


def _check_finite(path: Path, tensors: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> None:
    """Raise ``LoraFileError`` where a tensor to be written holds NaN or Inf, which no reader takes."""
    broken = [name for name, tensor in rounded.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if not broken:
        return
    large = [name for name in broken if is_finite(tensors[name])]
    if large:
        dtype = str(rounded[large[0]].dtype).removeprefix("torch.")
        raise LoraFileError(
            f"{path}: {len(large)} tensors hold values too large for {dtype}, such as {large[0]}; write float32"
        )
    raise LoraFileError(f"{path}: {len(broken)} tensors hold NaN or Inf, such as {broken[0]}; nothing was written")


def kohya_file_bytes(
    modules: Mapping[str, Change],
    *,
    dtype: torch.dtype,
    family: Family,
    base_modules: Mapping[str, tuple[int, ...]],
) -> int:
    """Bytes of the file that ``write_lora`` makes of ``modules``, which may be on the meta device, without metadata."""
    whole = _with_whole_attention(modules, family, base_modules)
    table, position = {}, 0
    for name, tensor in sorted(_kohya(whole, family, base_modules).items()):
        end = position + tensor.numel() * dtype.itemsize
        table[name] = TensorInfo(dtype=dtype, shape=tuple(tensor.shape), start=position, end=end)
        position = end
    return len(encode_header(table, {})) + position


def _with_whole_attention(
    modules: Mapping[str, Change], family: Family, base_modules: Mapping[str, tuple[int, ...]]
) -> dict[str, Change]:
    whole = dict(modules)
    parts = {encoder.part for encoder in family.text_encoders if encoder.spelling == "open_clip"}
    for name in modules:
        layer, attention, _ = name.rpartition(".self_attn.")
        if not attention or name.partition(".")[0] not in parts:
            continue
        for sibling in (f"{layer}.self_attn.{projection}_proj" for projection in ("q", "k", "v", "out")):
            if sibling in base_modules and sibling not in whole:
                out, inner = base_modules[sibling]
                whole[sibling] = LowRank(down=torch.zeros(1, inner), up=torch.zeros(out, 1), alpha=1.0)
    return whole


def _kohya(
    modules: Mapping[str, Change], family: Family, base_modules: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    keys = kohya_keys(modules, family, base_modules)
    lost = lost_elsewhere(keys.values(), family)
    if lost:
        raise LoraFileError(
            [
                f"{reader} would leave out {len(left_out)} modules of this file, such as {left_out[0]}"
                for reader, left_out in lost.items()
            ]
        )
    for name, key in keys.items():
        tensors |= {f"{key}.{suffix}": tensor for suffix, tensor in modules[name].tensors().items()}
        alpha = modules[name].alpha
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def _peft(modules: Mapping[str, Change], format: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """PEFT's names, or the older ones that diffusers still writes; every change at a scale of 1.

    Readers that know nothing of ``lora_adapter_metadata`` apply this scale, so alpha / rank is in the matrices.
    """
    tensors: dict[str, Tensor] = {}
    foreign = {name: change.kind for name, change in modules.items() if _low_rank(change) is None}
    if foreign:
        kinds = ", ".join(f"{count} of kind {kind}" for kind, count in Counter(foreign.values()).items())
        raise LoraFileError(
            f"{format} files hold only low-rank changes; this LoRA has {kinds}, such as {next(iter(foreign))}"
        )
    for name, change in modules.items():
        low_rank = _low_rank(change)
        if low_rank is None:
            continue
        down, up = "lora_A", "lora_B"
        if format == "diffusers":
            infix = "lora" if name.startswith("unet.") else "lora_linear_layer"
            down, up = f"{infix}.down", f"{infix}.up"
        scaled = _at_scale_one(low_rank, dtype)
        if not all(matrix.to(dtype).isfinite().all() for matrix in (scaled.up, scaled.down)):
            raise LoraFileError(
                f"{name}: times alpha / rank = {low_rank.scale:g} it is too large for {str(dtype).removeprefix('torch.')}; "
                "write float32"
            )
        tensors |= {f"{name}.{down}.weight": scaled.down, f"{name}.{up}.weight": scaled.up}
        if isinstance(change, Decomposed):
            tensors[f"{name}.lora_magnitude_vector.weight"] = change.magnitude.reshape(-1)
    return tensors


def _all_or_none_dora(modules: Mapping[str, Change], format: str) -> dict[str, Change]:
    """``modules`` as PEFT can hold them: in each part it takes all for DoRA or none.

    It would give a module without a magnitude the norms of the base's weight. So such modules are left out beside DoRA
    if their change is zero, and refused otherwise.
    """
    kept = dict(modules)
    for part in LORA_PARTS:
        changes = {name: change for name, change in modules.items() if name.startswith(f"{part}.")}
        plain = {name: change for name, change in changes.items() if not isinstance(change, Decomposed)}
        if len(plain) == len(changes):
            continue
        zero = {name for name, change in plain.items() if isinstance(change, LowRank) and not change.up.any()}
        if lost := plain.keys() - zero:
            raise LoraFileError(
                f"{format} files hold DoRA for all modules of {part} or for none; this LoRA has {len(lost)} without, such "
                f"as {min(lost)}, and {len(changes) - len(plain)} with it; kohya's format can hold both"
            )
        kept = {name: change for name, change in kept.items() if name not in zero}
    return kept


def _at_scale_one(change: LowRank, dtype: torch.dtype) -> LowRank:
    """``change`` at alpha = rank, with ``up`` in ``dtype``, computed in float32, or in float64 for float32.

    It is rounded once. Where the numbers of ``up`` are too small or too large for all bits of float16, the scale is in both
    matrices.
    """
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    scaled = LowRank(down=change.down, up=change.up.to(wide) * change.scale, alpha=float(change.rank))
    lost = (scaled.up.to(dtype).to(wide) - scaled.up).norm()
    # Rounding alone loses half a unit of the last of 11 bits, at most.
    if dtype == torch.float16 and not lost <= 2.0**-11 * scaled.up.norm():
        scaled = replace(scaled, down=scaled.down.to(wide)).evened()
    return replace(scaled, up=scaled.up.to(dtype))


def _low_rank(change: Change) -> LowRank | None:
    """The product of two matrices that PEFT knows, under a magnitude for each output or none."""
    inner = change.inner if isinstance(change, Decomposed) else change
    if not isinstance(inner, LowRank) or inner.mid is not None:
        return None
    by_output = not isinstance(change, Decomposed) or change.magnitude.numel() == inner.weight_shape[0]
    return inner if by_output else None


def _peft_path(name: str, part: str) -> str:
    """The end of a module's path that is the same with every version of transformers.

    From 5.6 its text encoders have no ``text_model.``. PEFT matches the ends of paths, so it finds this in all.
    """
    return name.removeprefix(f"{part}.").removeprefix(NESTING)


def _adapter_metadata(modules: Mapping[str, Change]) -> str:
    """PEFT's configuration of each part, as diffusers keeps it in the header; alpha is the rank, for a scale of 1."""
    table: dict[str, object] = {}
    for part in LORA_PARTS:
        changes = {_peft_path(n, part): c for n, c in modules.items() if n.startswith(f"{part}.")}
        if not changes:
            continue
        ranks = {name: change.rank for name, change in changes.items()}
        counts = Counter(ranks.values())
        rank = min(counts, key=lambda rank: (-counts[rank], rank))
        others = {name: value for name, value in sorted(ranks.items()) if value != rank}
        settings = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(changes),
            "use_dora": any(isinstance(change, Decomposed) for change in changes.values()),
            "use_rslora": False,
        }
        table |= {f"{part}.{key}": value for key, value in settings.items()}
    return json.dumps(table, sort_keys=True)
