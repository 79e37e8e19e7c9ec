"""LoRA files as records, and records as LoRA files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open

from ..base.family import FAMILIES, SD1, SD2, SDXL, Family
from ..errors import LoraFileError
from ..lora.weights import LowRank
from .hashes import legacy_hash
from .keys import kohya_keys, part_of
from .safetensors_file import Header, read_header, serialise, write_whole

_ROLES = {
    "down": ("lora_down", "lora_A", "lora_A.default", "lora.down", "lora_linear_layer.down"),
    "up": ("lora_up", "lora_B", "lora_B.default", "lora.up", "lora_linear_layer.up"),
}
_SUFFIXES = {f".{matrix}.weight": role for role, matrices in _ROLES.items() for matrix in matrices} | {
    ".alpha": "alpha"
}


_LORA_TENSOR = (
    r"(^|[._])(lora_(down|up|mid|A|B|linear_layer)|lora\.(down|up)|hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_blocks)(\.|$)"
)


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """``modules`` is keyed as the file spells its modules, less the tensor's own suffix.

    ``problems`` are sentences about tensors that cannot be used; they are kept out of ``modules`` and never silent.
    """

    path: Path
    modules: Mapping[str, LowRank]
    metadata: Mapping[str, str]
    dialect: str
    dtype: str
    problems: tuple[str, ...]

    @property
    def family(self) -> Family | None:
        """By names and shapes first, by metadata, which may lie, where those leave it open."""
        flat = {key.replace(".", "_"): module for key, module in self.modules.items()}
        if any(part_of(key) == "text_encoder_2" for key in self.modules) or _has(flat, r"transformer_blocks_1_"):
            return SDXL
        # Of the families, SDXL alone has no attention on its first level.
        first_level = _has(flat, r"(down_blocks_0_attentions|input_blocks_[12]_1_)")
        if _has(flat, r"(input|output)_blocks_") and not first_level:
            return SDXL
        widths = {m.down.shape[1] for key, m in flat.items() if re.search(r"attn2_to_[kv]$", key)}
        for family in FAMILIES.values():
            if widths == {family.unet.cross_attention_dim}:
                return family
        if any(m.down.ndim == 4 for key, m in flat.items() if key.endswith("_proj_in")):
            return SD1
        if first_level and _has(flat, r"_proj_in$"):
            return SD2
        version = self.metadata.get("ss_base_model_version", "")
        for family in FAMILIES.values():
            if version.startswith(family.kohya_version.split("_base")[0]):
                return family
        architecture = self.metadata.get("modelspec.architecture", "")
        return next((f for f in FAMILIES.values() if f.modelspec_architecture == architecture), None)

    @property
    def ranks(self) -> tuple[int, float, int]:
        """Smallest, median, largest."""
        return _spread([module.rank for module in self.modules.values()])

    @property
    def alphas(self) -> tuple[float, float, float]:
        return _spread([module.alpha for module in self.modules.values()])


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names belong to a LoRA, of whatever kind."""
    return _has(names, _LORA_TENSOR)


def _has(keys: Iterable[str], pattern: str) -> bool:
    return any(re.search(pattern, key) for key in keys)


def _spread(values):
    return (min(values), median(values), max(values)) if values else (0, 0, 0)


def read_lora(path: Path) -> LoraFile:
    """Read every low-rank module of a kohya, diffusers or PEFT file.

    Raises:
        LoraFileError: the file is missing, damaged, or holds no LoRA.
    """
    header = read_header(path, LoraFileError)
    grouped, foreign = _group(header)
    if not grouped:
        raise LoraFileError(f"{path}: holds no LoRA: none of its {len(header.tensors)} tensors is named like one")
    modules, problems = {}, [f"tensor {name} is of a kind that cannot be applied" for name in foreign]
    with safe_open(path, framework="pt") as file:
        for key, roles in sorted(grouped.items()):
            lacking = [role for role in ("down", "up") if role not in roles]
            if lacking:
                problems.append(f"module {key} has no {' and no '.join(lacking)} matrix")
                continue
            down, up = file.get_tensor(roles["down"]), file.get_tensor(roles["up"])
            if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
                problems.append(f"module {key}: shapes {tuple(down.shape)} and {tuple(up.shape)} do not multiply")
                continue
            if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
                problems.append(f"module {key} holds NaN or infinity")
                continue
            alpha = float(file.get_tensor(roles["alpha"])) if "alpha" in roles else float(down.shape[0])
            modules[key] = LowRank(down=down, up=up, alpha=alpha)
    if not modules:
        raise LoraFileError([f"{path}: {problem}" for problem in problems])
    dtypes = sorted({str(module.down.dtype).removeprefix("torch.") for module in modules.values()})
    return LoraFile(
        path=path,
        modules=modules,
        metadata=dict(header.metadata),
        dialect=_dialect(header),
        dtype=", ".join(dtypes),
        problems=tuple(problems),
    )


def _group(header: Header) -> tuple[dict[str, dict[str, str]], list[str]]:
    grouped: dict[str, dict[str, str]] = {}
    foreign = []
    for name in header.tensors:
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is None:
            foreign.append(name)
            continue
        key = name.removesuffix(suffix).removeprefix("base_model.model.")
        grouped.setdefault(key, {})[_SUFFIXES[suffix]] = name
    return grouped, foreign


def _dialect(header: Header) -> str:
    names = header.tensors.keys()
    if any(name.startswith("lora_") for name in names):
        return "kohya"
    return "peft" if any(".lora_A." in name for name in names) else "diffusers"


def write_kohya(
    path: Path,
    modules: Mapping[str, LowRank],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype,
    family: Family = SD1,
    base_modules: Collection[str] = (),
) -> None:
    """Write canonical ``modules`` under kohya's names, with alphas, and with the hashes of the final bytes.

    ``base_modules`` as in ``kohya_keys``: SDXL needs them. The file is read back before this returns; a module that would
    be lost raises ``LoraFileError``.
    """
    tensors, keys = {}, kohya_keys(modules, family, base_modules)
    for name, module in modules.items():
        key = keys[name]
        tensors[f"{key}.lora_down.weight"] = module.down.to(dtype)
        tensors[f"{key}.lora_up.weight"] = module.up.to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(module.alpha, dtype=dtype)
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header, payload = serialise(tensors, training)
    digest = hashlib.sha256(payload).hexdigest()
    hashed = {
        **metadata,
        "sshs_model_hash": digest,
        "sshs_legacy_hash": legacy_hash(header + payload),
        "modelspec.hash_sha256": f"0x{digest}",
    }
    header, payload = serialise(tensors, hashed)
    write_whole(path, header, payload)
    if len(read_lora(path).modules) != len(modules):
        raise LoraFileError(f"{path}: not every module can be read back")
