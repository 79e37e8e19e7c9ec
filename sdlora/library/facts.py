"""What the table of tensors in a LoRA's header shows: family, format, kinds, ranks, modules. No weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from ..families import LORA_PARTS
from ..formats.keys import part_of
from ..formats.lora_family import FamilyMarks, family_of, marks_of
from ..formats.lora_names import BUNDLED, format_of, group_by_module, is_lora
from ..formats.safetensors_header import TensorForm, TensorTable

Shape = tuple[int, ...]
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""Name of a dtype in a header -> torch's name, as ``inspect`` has it. Whole numbers are settings, not matrices."""
_KIND_MARKS: Mapping[str, tuple[str, ...]] = {
    "lora": ("down", "up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "ia3": ("on_input",),
    "full": ("w_norm", "b_norm", "diff", "diff_b"),
    "glora": ("a1", "a2", "b1", "b2"),
    "oft": ("oft_blocks", "oft_diag"),
}
"""Kind of change -> roles of its tensors, of which one is enough; the first kind that has one. As ``build_change`` does."""
_INNER: Mapping[str, tuple[str, ...]] = {"lora": ("down",), "loha": ("hada_w1_b",), "lokr": ("lokr_w1_b", "lokr_w2_b")}
"""Kind of change -> roles of the tensor whose first extent is the rank; the first that is there."""
_UNCOUNTED = (".alpha", ".on_input")
"""Ends of the names of tensors that are settings, whose dtype says nothing."""


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """A function of the names, dtypes and shapes of a file's tensors: files of one trainer, base and rank share it."""

    is_lora: bool
    payload_bytes: int
    """Bytes of all tensors."""
    family: str | None
    """None where names and shapes leave it open."""
    format: str
    """``LoraFile.format``."""
    kinds: dict[str, int]
    """Kind of change -> number of modules."""
    modules: dict[str, int]
    """Part -> number of modules; ``unknown`` where the prefix is."""
    ranks: tuple[int, int] | None
    """Lowest and highest; None where no module has a rank."""
    dtype: str
    """As ``LoraFile.dtype``."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TableFacts:
        """The inverse of ``to_json``. Raises ``TypeError`` where fields are missing or unknown."""
        given: dict[str, Any] = {**fields, "ranks": fields["ranks"] and tuple(fields["ranks"])}
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class NameFacts:
    """A function of the names of a file's tensors: files of one trainer and choice of modules share it at any rank."""

    is_lora: bool
    format: str
    modules: Mapping[str, Mapping[str, str]]
    """Module as the file spells it -> role -> tensor's name, of each module that holds the matrices of a known kind."""
    kinds: Mapping[str, int]
    """Kind of change -> number of modules."""
    parts: Mapping[str, int]
    """Part -> number of modules."""
    family: FamilyMarks
    inner: tuple[str, ...]
    """Names of the tensors whose first extent is the rank of their module."""
    generalised: tuple[Mapping[str, str], ...]
    """Tensors' names by role, of the modules whose rank several shapes show."""
    counted: tuple[str, ...]
    """Names of the tensors whose dtypes are the file's."""


@lru_cache(maxsize=32)
def facts_of_names(names: tuple[str, ...]) -> NameFacts:
    """What ``names`` show; remembered, since most files of a collection have names that others have too."""
    grouped, _ = group_by_module(name for name in names if not name.startswith(BUNDLED))
    modules, kinds = {}, {}
    for key, roles in grouped.items():
        kind = _kind(roles)
        if kind is not None:
            short = key.removeprefix("base_model.model.")
            modules[short], kinds[short] = roles, kind
    parts = Counter(part_of(key) or "unknown" for key in modules)
    return NameFacts(
        is_lora=bool(modules) and is_lora(names),
        format=format_of(names),
        modules=modules,
        kinds=Counter(_decomposed(kind, modules[key]) for key, kind in kinds.items()),
        parts={part: parts[part] for part in (*LORA_PARTS, "unknown") if part in parts},
        family=marks_of(modules),
        inner=tuple(filter(None, (_inner(kind, modules[key]) for key, kind in kinds.items()))),
        generalised=tuple(modules[key] for key, kind in kinds.items() if kind == "glora"),
        counted=tuple(name for name in names if not name.endswith(_UNCOUNTED) and not name.startswith(BUNDLED)),
    )


def shapes_by_module(tensors: Mapping[str, TensorForm]) -> dict[str, dict[str, Shape]]:
    """Module as the file spells it -> role -> shape, of each module that holds the matrices of a known kind."""
    return {key: _shapes(roles, tensors) for key, roles in facts_of_names(tuple(tensors)).modules.items()}


def facts_of(table: TensorTable) -> TableFacts:
    """What the names, dtypes and shapes of ``table`` show."""
    tensors = table.tensors
    names = facts_of_names(tuple(tensors))
    weights = {key: _weight_shape(_shapes(names.modules[key], tensors)) for key in names.family.deciding}
    family = family_of(names.family, weights)
    ranks = {shape[0] for shape in {tensors[name].shape for name in names.inner} if shape}
    ranks |= {rank for roles in names.generalised if (rank := _generalised_rank(_shapes(roles, tensors))) is not None}
    dtypes = {tensors[name].dtype for name in names.counted}
    return TableFacts(
        is_lora=names.is_lora,
        payload_bytes=table.payload_bytes,
        family=family.name if family else None,
        format=names.format,
        kinds=dict(names.kinds),
        modules=dict(names.parts),
        ranks=(min(ranks), max(ranks)) if ranks else None,
        dtype=", ".join(sorted(_DTYPES[dtype] for dtype in dtypes if dtype in _DTYPES)),
    )


def _shapes(roles: Mapping[str, str], tensors: Mapping[str, TensorForm]) -> dict[str, Shape]:
    return {role: tensors[name].shape for role, name in roles.items()}


def _kind(roles: Collection[str]) -> str | None:
    """The kind that tensors of these roles make up, without what is said of a magnitude."""
    return next((kind for kind, marks in _KIND_MARKS.items() if any(mark in roles for mark in marks)), None)


def _decomposed(kind: str, roles: Mapping[str, str]) -> str:
    """``kind`` with what is said of a magnitude."""
    if not roles.keys() & {"magnitude", "magnitude_vector"}:
        return kind
    return "dora" if kind == "lora" else f"dora-{kind}"


def _inner(kind: str, roles: Mapping[str, str]) -> str | None:
    """Name of the tensor whose first extent is ``Change.rank``; None for other kinds and where it is missing."""
    return next((roles[role] for role in _INNER.get(kind, ()) if role in roles), None)


def _generalised_rank(shapes: Mapping[str, Shape]) -> int | None:
    """``Change.rank`` of GLoRA; None where its tensors are not as they should be."""
    if not {"a1", "a2", "b1", "b2"} <= shapes.keys():
        return None
    # Early files have each pair in the other order, which shows in the place of the rank.
    inner = shapes["b2"] if _product_fits(shapes) else shapes["b1"]
    return inner[0] if inner else None


def _product_fits(shapes: Mapping[str, Shape]) -> bool:
    a1, a2, b1, b2 = (shapes[name] for name in ("a1", "a2", "b1", "b2"))
    return min(map(len, (a1, a2, b1, b2))) >= 2 and a1[1] == a2[0] == b1[1] == b2[0]


def _weight_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """``Change.weight_shape``; None where the shapes leave it open."""
    kind = _kind(shapes)
    if kind == "full":
        return shapes.get("w_norm" if shapes.keys() & {"w_norm", "b_norm"} else "diff")
    down, up = shapes.get("down"), shapes.get("up")
    if kind != "lora" or not down or not up or len(down) < 2:
        return None
    return (up[0], down[1], *shapes.get("mid", down)[2:])
