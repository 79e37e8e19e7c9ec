"""Two checkpoints -> a LoRA that turns one into the other, as far as its rank allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.checkpoint import BaseCheckpoint, base_path, find_base
from ..base.detect import detect_checkpoint
from ..base.parts import Part
from ..errors import CompatibilityError, LoraFileError
from ..formats.lora_tensors import is_finite
from ..formats.lora_writer import write_lora
from ..formats.metadata import family_metadata, safe_title
from ..formats.tensor_files import read_tensors
from ..lora.change import Change
from ..lora.combining import Cut, Spectrum
from ..progress import Progress, progress_or_bar
from .merge import cut_problems, in_dtype
from .named_lora import check_new_lora


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What was extracted."""

    output: str
    family: str
    modules: int
    """Modules that differ."""
    same: int
    """Modules that do not."""
    rank: tuple[int, int]
    """Lowest and highest rank."""
    energy: float
    """Share of the whole ‖ΔW‖² that was kept."""
    left_out: tuple[str, ...]
    """Tensors that differ and that a LoRA of this kind cannot hold: biases, norms, embeddings; by their names here."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)


def extract(
    base: str | Path,
    tuned: str | Path,
    target: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    precision: str = "float16",
    progress: Progress | None = None,
) -> Extraction:
    """Write the difference of two checkpoints as a LoRA, linear layers and convolutions: each module's closest change.

    Args:
        base: ``mini``, a checkpoint file, or the folder of a diffusers checkpoint.
        tuned: another of the same family, named likewise; it may lack text encoders or the VAE.
        rank: the highest rank of a module.
        energy: share of ‖ΔW‖² of each module that is kept, above 0 and up to 1.
        precision: ``float16``, ``bfloat16`` or ``float32``.
        progress: a bar on standard error by default.

    Raises:
        BaseModelError, CompatibilityError, LoraFileError: a checkpoint cannot be used, they are of different families or
            sizes or do not differ, or the target exists. Nothing is written then.
    """
    target = Path(target)
    check_new_lora(target)
    cut = _cut(rank, energy)
    with progress_or_bar(progress) as shown:
        checkpoint = find_base(str(base))
        parts = _tuned_parts(checkpoint, base_path(tuned))
        dtype, shapes = getattr(torch, precision), checkpoint.module_shapes()
        modules: dict[str, Change] = {}
        same, kept, whole, other = 0, 0.0, 0.0, []
        names = [f"{part}.{name}" for part in parts for name in sorted(parts[part].tensors)]
        shown.start("Extracting", len(names))
        for name in names:
            delta = _difference(name, checkpoint, parts)
            module = name.removesuffix(".weight")
            if not delta.any():
                same += module in shapes and delta.ndim > 1
            elif module == name or delta.ndim not in (2, 4) or module not in shapes:
                other.append(name)
            else:
                spectrum = Spectrum.of_matrix(delta)
                change = spectrum.cut(cut)
                modules[module] = in_dtype(change, dtype)
                size = float(delta.double().square().sum())
                kept, whole = kept + size * spectrum.energy(change.rank), whole + size
            shown.advance()
        if not modules:
            raise LoraFileError(f"{tuned}: has the same layers as {base}; there is nothing to extract")
        write_lora(
            target,
            modules,
            _metadata(target, checkpoint),
            dtype=dtype,
            family=checkpoint.family,
            base_modules=shapes,
        )
    ranks = [change.rank or 0 for change in modules.values()]
    return Extraction(
        output=str(target),
        family=checkpoint.family.name,
        modules=len(modules),
        same=same,
        rank=(min(ranks), max(ranks)),
        energy=kept / whole,
        left_out=tuple(other),
    )


def _cut(rank: int | None, energy: float | None) -> Cut:
    problems = cut_problems(rank, energy)
    if rank is energy is None:
        problems.append("name the size of the LoRA: --rank or --energy")
    if problems:
        raise LoraFileError(problems)
    return Cut(rank=rank, energy=energy)


def _tuned_parts(base: BaseCheckpoint, tuned: Path) -> dict[str, Part]:
    """UNet and text encoders of ``tuned``, as far as it has them."""
    found = detect_checkpoint(tuned)
    family = found.require_family()
    if family is not base.family:
        raise CompatibilityError(f"{tuned}: is {family.title}; the base {base.name} is {base.family.title}")
    parts = {part: content for part, content in found.parts.items() if part != "vae" and part in base.parts}
    for part, content in parts.items():
        shapes, expected = content.shapes(), base.parts[part].shapes()
        wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        if wrong:
            raise CompatibilityError(
                f"{tuned}: {len(wrong)} tensors of its {part.replace('_', ' ')} have another shape than those of the base "
                f"{base.name}, or only one of them has them, such as {wrong[0]}"
            )
    return parts


def _difference(name: str, base: BaseCheckpoint, parts: Mapping[str, Part]) -> Tensor:
    """Tuned minus base of one tensor, float32. Raises ``LoraFileError`` where it is NaN or Inf."""
    part, _, path = name.partition(".")
    wanted = {"tuned": parts[part].tensors[path], "base": base.parts[part].tensors[path]}
    read = read_tensors(wanted, dtype=torch.float32, device=torch.device("cpu"))
    delta = read["tuned"].sub_(read["base"])
    if not is_finite(delta):
        files = " or ".join(f"{wanted[whose].file.path}" for whose in ("tuned", "base"))
        raise LoraFileError(f"{files}: {name} holds NaN or Inf; one of them is damaged, use another")
    return delta


def _metadata(target: Path, base: BaseCheckpoint) -> dict[str, str]:
    return {
        **family_metadata(base.family, base.schedule.prediction),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": safe_title(target.stem),
        "ss_network_module": "networks.lora",
        "ss_output_name": safe_title(target.stem),
        "ss_sd_model_name": base.name,
    }
