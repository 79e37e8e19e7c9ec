"""The tensors of one module, as LoRA files name them -> its change. Every kind, every spelling of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ..lora.change import Change
from ..lora.kinds import Decomposed, Full, Generalised, Hadamard, Kronecker, Orthogonal, Scaling
from ..lora.low_rank import LowRank
from .peft_settings import Scale

_NO_CHANGES = {
    "set_weight": "puts another weight in the place of the base's (set_weight), which no strength can scale",
    "reshape_weight": "is for a weight of another shape than the base's (reshape_weight)",
}


_WHOLE_NUMBERS = ("alpha", "on_input")
"""What may be stored as whole numbers, or as true and false."""


def build_change(tensors: Mapping[str, Tensor], *, scale: Scale) -> Change:
    """The change that tensors by role make up. ``scale`` is what the file keeps elsewhere, if anything.

    Raises:
        ValueError: something is missing, does not fit or is not finite; the text is the end of a sentence on the module.
    """
    for role in tensors.keys() & _NO_CHANGES.keys():
        raise ValueError(_NO_CHANGES[role])
    for role, tensor in tensors.items():
        if not tensor.is_floating_point() and role not in _WHOLE_NUMBERS:
            raise ValueError(
                f"holds {str(tensor.dtype).removeprefix('torch.')} ({role}), expected floating-point numbers"
            )
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"holds NaN or infinity ({role})")
    stored = tensors.get("alpha")
    if stored is not None and stored.numel() != 1:
        raise ValueError(f"has an alpha of shape {tuple(stored.shape)}")
    change = _kind(tensors, scale.alpha if stored is None else float(stored))
    if isinstance(change, Kronecker) and change.rank is None and scale.whole_factors and scale.alpha and scale.rank:
        change = replace(change, w1=_times(change.w1, scale.alpha / scale.rank))
    return _decomposed(change, tensors)


def empty_change(shapes: Mapping[str, tuple[int, ...]]) -> Change:
    """The change that tensors of these roles and shapes make up, on the meta device: for what shapes alone decide.

    An IA³ vector is taken as one of outputs; which it is of is a number in the file.

    Raises:
        ValueError: as ``build_change``.
    """
    meta = {role: torch.empty(shape, device="meta") for role, shape in shapes.items()}
    if "on_input" in meta:
        meta["on_input"] = torch.zeros(())
    return _decomposed(_kind(meta, None), meta)


def _decomposed(change: Change, tensors: Mapping[str, Tensor]) -> Change:
    """``change``, or DoRA over it where a magnitude is among ``tensors``."""
    magnitude = tensors.get("magnitude")
    if "magnitude_vector" in tensors:
        magnitude = tensors["magnitude_vector"].reshape(-1, *[1] * (len(change.weight_shape or (0, 0)) - 1))
    return change if magnitude is None else Decomposed(inner=change, magnitude=magnitude)


_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of a number in bytes -> integers of that size."""


@cache
def _infinity(dtype: torch.dtype) -> int:
    """The bits of infinity, read as an integer."""
    return int(torch.tensor(math.inf, dtype=dtype).view(_WHOLE[dtype.itemsize]))


def is_finite(tensor: Tensor) -> bool:
    """By bits: read as integers, infinity and NaN are above the finite numbers of their sign.

    Several times as fast as ``torch.isfinite``, and without a second tensor.
    """
    if not tensor.numel():
        return True
    tensor = tensor.contiguous() if tensor.itemsize > 1 else tensor.float()
    infinity = _infinity(tensor.dtype)
    bits = tensor.view(-1).view(_WHOLE[tensor.itemsize]).numpy()
    sign = 1 << (8 * tensor.itemsize - 1)
    return bits.max() < infinity and int(bits.view(f"u{tensor.itemsize}").max()) < sign + infinity


def _kind(tensors: Mapping[str, Tensor], alpha: float | None) -> Change:
    if tensors.keys() & {"down", "up"}:
        return _low_rank(tensors, alpha)
    if any(role.startswith("hada_") for role in tensors):
        return _hadamard(tensors, alpha)
    if any(role.startswith("lokr_") for role in tensors):
        return _kronecker(tensors, alpha)
    if "on_input" in tensors:
        vector = _required(tensors, "", ("vector",))["vector"]
        return Scaling(weight=vector, on_input=bool(tensors["on_input"]))
    if tensors.keys() & {"w_norm", "b_norm"}:
        return Full(diff=tensors.get("w_norm"), bias=tensors.get("b_norm"), of_norm=True)
    if tensors.keys() & {"diff", "diff_b"}:
        return Full(diff=tensors.get("diff"), bias=tensors.get("diff_b"))
    if tensors.keys() & {"a1", "a2", "b1", "b2"}:
        return _generalised(_required(tensors, "", ("a1", "a2", "b1", "b2")), alpha)
    if tensors.keys() & {"oft_blocks", "oft_diag"}:
        return _orthogonal(tensors, alpha)
    raise ValueError(f"has no matrices, only {', '.join(sorted(tensors))}")


def _hadamard(tensors: Mapping[str, Tensor], alpha: float | None) -> Hadamard:
    parts = _required(tensors, "hada_", ("w1_a", "w1_b", "w2_a", "w2_b"))
    cores = {name: tensors[f"hada_{name}"] for name in ("t1", "t2") if f"hada_{name}" in tensors}
    if len(cores) == 2:
        shapes = [_tucker(cores[f"t{i}"], parts[f"w{i}_a"], parts[f"w{i}_b"]) for i in (1, 2)]
    else:
        shapes = [_multiplied(parts[f"w{i}_a"], parts[f"w{i}_b"]) for i in (1, 2)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"has two products of different shapes: {shapes[0]} and {shapes[1]}")
    return Hadamard(**parts, **cores, alpha=_or_rank(alpha, parts["w1_b"]))


def _kronecker(tensors: Mapping[str, Tensor], alpha: float | None) -> Kronecker:
    parts = {role.removeprefix("lokr_"): tensor for role, tensor in tensors.items() if role.startswith("lokr_")}
    for factor in ("w1", "w2"):
        if factor in parts:
            continue
        pair = _required(tensors, "lokr_", (f"{factor}_a", f"{factor}_b"))
        if factor == "w2" and "t2" in parts:
            _tucker(parts["t2"], pair["w2_a"], pair["w2_b"])
        else:
            _multiplied(pair[f"{factor}_a"], pair[f"{factor}_b"])
    inner = parts.get("w1_b", parts.get("w2_b"))
    return Kronecker(**parts, alpha=_or_rank(alpha, inner))


def _orthogonal(tensors: Mapping[str, Tensor], alpha: float | None) -> Orthogonal:
    turned = "oft_diag" in tensors
    blocks = tensors["oft_diag" if turned else "oft_blocks"]
    if blocks.ndim not in ((3,) if turned else (3, 4)) or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(f"has OFT blocks of shape {tuple(blocks.shape)}")
    return Orthogonal(blocks=blocks, turned=turned, rescale=tensors.get("rescale"), alpha=alpha or 0.0)


def _multiplied(left: Tensor, right: Tensor) -> tuple[int, ...]:
    """Shape of ``left`` @ ``right``."""
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"has matrices that do not multiply: {tuple(left.shape)} and {tuple(right.shape)}")
    return (left.shape[0], right.shape[1])


def _tucker(core: Tensor, out: Tensor, inner: Tensor) -> tuple[int, ...]:
    """Shape of Σ core[i, j, …] out[i, o] inner[j, n]."""
    if core.ndim < 2 or out.ndim != 2 or inner.ndim != 2 or core.shape[:2] != (out.shape[0], inner.shape[0]):
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in (core, out, inner))
        raise ValueError(f"has a core and matrices that do not multiply: {shapes}")
    return (out.shape[1], inner.shape[1], *core.shape[2:])


def _low_rank(tensors: Mapping[str, Tensor], alpha: float | None) -> LowRank:
    parts = _required(tensors, "", ("down", "up"))
    down, up, mid = parts["down"], parts["up"], tensors.get("mid")
    if down.ndim == 4 and up.ndim == 2:
        # LyCORIS' DyLoRA.
        up = up[:, :, None, None]
    inner = down.shape[0] if mid is None else mid.shape[1]
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and down.shape[0] == inner and 0 not in (*down.shape, *up.shape)
    if not fits or up.shape[1] != (down if mid is None else mid).shape[0]:
        raise ValueError(f"has matrices that do not multiply: {tuple(down.shape)} and {tuple(up.shape)}")
    return LowRank(down=down, up=up, mid=mid, alpha=_or_rank(alpha, down))


def _generalised(parts: Mapping[str, Tensor], alpha: float | None) -> Generalised:
    """LyCORIS wrote each pair of matrices in the other order at first, which shows in the place of the rank."""
    a1, a2, b1, b2 = (parts[name] for name in ("a1", "a2", "b1", "b2"))
    if min(part.ndim for part in parts.values()) < 2:
        raise ValueError("has GLoRA matrices with fewer than two axes")
    if not a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    for left, right in ((a1, a2), (b1, b2)):
        _multiplied(left.flatten(1), right.flatten(1))
    return Generalised(a1=a1, a2=a2, b1=b1, b2=b2, alpha=_or_rank(alpha, b2))


def _required(tensors: Mapping[str, Tensor], prefix: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    missing = [name for name in names if prefix + name not in tensors]
    if missing:
        lacking = " and no ".join(f"{prefix}{name} matrix" for name in missing)
        raise ValueError(f"has no {lacking}")
    found = {name: tensors[prefix + name] for name in names}
    flat = [name for name, tensor in found.items() if tensor.ndim < 1 or 0 in tensor.shape]
    if flat:
        raise ValueError(f"has an empty {prefix}{flat[0]}")
    return found


def _times(tensor: Tensor | None, factor: float) -> Tensor | None:
    """In the tensor's dtype where that loses nothing, else in float32."""
    if tensor is None or factor == 1:
        return tensor
    wide = (tensor.double() * factor).float()
    narrow = wide.to(tensor.dtype)
    return narrow if torch.equal(narrow.double(), tensor.double() * factor) else wide


def _or_rank(alpha: float | None, inner: Tensor | None) -> float:
    """A file without alpha means a scale of 1; kohya takes an alpha of 0 as none."""
    rank = 1.0 if inner is None else float(inner.shape[0])
    return alpha or rank
