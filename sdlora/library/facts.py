"""What the table of tensors in a LoRA's header shows: family, format, kinds, ranks, modules. No weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..families import LORA_PARTS
from ..formats.keys import part_of
from ..formats.lora_family import family_of_shapes
from ..formats.lora_names import BUNDLED, format_of, group_by_module, is_lora

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
class ModuleFacts:
    """One module of a LoRA, as far as shapes show it."""

    kind: str
    rank: int | None
    weight_shape: Shape | None
    """Shape of the weight that it changes; None where the shapes of its tensors leave it open."""


def shapes_by_module(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Shape]]:
    """Module as the file spells it -> role -> shape, of each module that holds the matrices of a known kind.

    ``table`` is that of ``formats.safetensors_header.parse_header``.
    """
    grouped, _ = group_by_module(name for name in table if not name.startswith(BUNDLED))
    return {
        key.removeprefix("base_model.model."): {role: tuple(table[name]["shape"]) for role, name in roles.items()}
        for key, roles in grouped.items()
        if _kind(roles) is not None
    }


def facts_of(table: Mapping[str, Mapping[str, Any]]) -> TableFacts:
    """What ``table`` shows; see ``shapes_by_module``."""
    modules = {key: _module(shapes) for key, shapes in shapes_by_module(table).items()}
    family = family_of_shapes({key: module.weight_shape for key, module in modules.items()})
    parts = Counter(part_of(key) or "unknown" for key in modules)
    ranks = [module.rank for module in modules.values() if module.rank is not None]
    dtypes = {_DTYPES[entry["dtype"]] for name, entry in table.items() if _counts(name) and entry["dtype"] in _DTYPES}
    return TableFacts(
        is_lora=bool(modules) and is_lora(table),
        payload_bytes=max((entry["data_offsets"][1] for entry in table.values()), default=0),
        family=family.name if family else None,
        format=format_of(table),
        kinds=dict(Counter(module.kind for module in modules.values())),
        modules={part: parts[part] for part in (*LORA_PARTS, "unknown") if part in parts},
        ranks=(min(ranks), max(ranks)) if ranks else None,
        dtype=", ".join(sorted(dtypes)),
    )


def _counts(name: str) -> bool:
    return not name.endswith((".alpha", ".on_input")) and not name.startswith(BUNDLED)


def _kind(roles: Collection[str]) -> str | None:
    """The kind that tensors of these roles make up, without what is said of a magnitude."""
    return next((kind for kind, marks in _KIND_MARKS.items() if any(mark in roles for mark in marks)), None)


def _module(shapes: Mapping[str, Shape]) -> ModuleFacts:
    kind = _kind(shapes.keys()) or ""
    rank, weight = _rank(kind, shapes), _weight_shape(kind, shapes)
    if shapes.keys() & {"magnitude", "magnitude_vector"}:
        kind = "dora" if kind == "lora" else f"dora-{kind}"
    return ModuleFacts(kind=kind, rank=rank, weight_shape=weight)


def _rank(kind: str, shapes: Mapping[str, Shape]) -> int | None:
    """As ``Change.rank`` of the kind; None too where its tensors are not as they should be."""
    inner = {
        "lora": shapes.get("down"),
        "loha": shapes.get("hada_w1_b"),
        "lokr": shapes.get("lokr_w1_b", shapes.get("lokr_w2_b")),
    }.get(kind)
    if kind == "glora" and {"a1", "a2", "b1", "b2"} <= shapes.keys():
        # Early files have each pair in the other order, which shows in the place of the rank.
        inner = shapes["b2"] if _product_fits(shapes) else shapes["b1"]
    return inner[0] if inner else None


def _product_fits(shapes: Mapping[str, Shape]) -> bool:
    a1, a2, b1, b2 = (shapes[name] for name in ("a1", "a2", "b1", "b2"))
    return min(map(len, (a1, a2, b1, b2))) >= 2 and a1[1] == a2[0] == b1[1] == b2[0]


def _weight_shape(kind: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """As ``Change.weight_shape`` of the kind."""
    if kind == "full":
        return shapes.get("w_norm" if shapes.keys() & {"w_norm", "b_norm"} else "diff")
    down, up = shapes.get("down"), shapes.get("up")
    if kind != "lora" or not down or not up or len(down) < 2:
        return None
    return (up[0], down[1], *shapes.get("mid", down)[2:])
