"""A LoRA file -> one of lower rank, or of a rank for each module."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraFileError
from ..formats.lora_writer import write_lora
from ..formats.metadata import with_family
from ..lora.change import Change
from ..lora.combining import Cut, Spectrum, plain
from ..progress import Progress, progress_or_bar
from .merge import cut_problems, in_dtype
from .named_lora import Modules, check_new_lora, output_dtype, read_named


@dataclass(frozen=True, kw_only=True)
class Resize:
    """What became of a file."""

    output: str
    modules: int
    ranks: dict[int, int]
    """Rank -> number of modules."""
    energy: float
    """Least share of ‖ΔW‖² of a module that was kept."""
    mean_energy: float
    bytes_before: int
    bytes_after: int
    left_out: tuple[str, ...]
    """What the source holds and the output does not, as sentences."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)


def resize(
    source: str | Path,
    target: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    base: str | None = None,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Resize:
    """Write the LoRA in ``source`` at a lower rank: each module's closest change (Eckart & Young 1936), at alpha = rank.

    With several limits, each module has the lowest rank of them. LoHa, LoKr and DoRA become plain low-rank changes.

    Args:
        rank: the highest rank of a module.
        energy: share of ‖ΔW‖² of each module that is kept, above 0 and up to 1.
        ratio: singular values down to the largest divided by this are kept; kohya's ``sv_ratio``.
        base: as in ``merge``. precision: as in ``merge``. progress: a bar on standard error by default.

    Raises:
        LoraFileError, BaseModelError: the source cannot be used, or the target exists. Nothing is written then.
    """
    source, target = Path(source), Path(target)
    check_new_lora(target)
    problems = cut_problems(rank, energy)
    if rank is energy is ratio is None:
        problems.append("name the new size: --rank, --energy or --ratio")
    if ratio is not None and ratio < 1:
        problems.append(f"ratio {ratio:g}: expected a number of at least 1")
    if problems:
        raise LoraFileError(problems)
    cut = Cut(rank=rank, energy=energy, ratio=ratio)
    with progress_or_bar(progress) as shown:
        modules, (lora,) = read_named([source], base)
        dtype = output_dtype(precision, [lora.file])
        resized: dict[str, Change] = {}
        shares, lost = [], []
        shown.start("Resizing", len(lora.changes))
        for name, change in sorted(lora.changes.items()):
            if len(modules.shapes[name]) == 1:  # Norms have no rank.
                resized[name] = change
            else:
                spectrum = _spectrum(name, change, modules, source)
                smaller = spectrum.cut(cut)
                resized[name] = in_dtype(smaller, dtype)
                shares.append(spectrum.energy(smaller.rank))
                lost += [f"the bias of {name}"] if change.bias_delta() is not None else []
            shown.advance()
        ranks = Counter(change.rank for change in resized.values() if change.rank)
        write_lora(
            target,
            resized,
            with_family(lora.file.metadata, modules.family) | _stated_ranks(ranks),
            dtype=dtype,
            family=modules.family,
            base_modules=modules.shapes,
            bundled=lora.file.bundled,
        )
    return Resize(
        output=str(target),
        modules=len(resized),
        ranks=dict(sorted(ranks.items())),
        energy=min(shares, default=1.0),
        mean_energy=sum(shares) / max(1, len(shares)),
        bytes_before=lora.file.weights.stat().st_size,
        bytes_after=target.stat().st_size,
        left_out=(*lora.file.problems, *lost),
    )


def _spectrum(name: str, change: Change, modules: Modules, source: Path) -> Spectrum:
    low_rank = plain(change)
    if low_rank is not None:
        return Spectrum.of_product([(low_rank, 1.0)], modules.shapes[name])
    return Spectrum.of_matrix(change.delta(modules.weight(name, {str(source): change}).double()))


def _stated_ranks(ranks: Counter[int]) -> dict[str, str]:
    """Kohya's keys; where modules differ, its tools write ``Dynamic``."""
    stated = str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"
    return {"ss_network_dim": stated, "ss_network_alpha": stated, "ss_network_module": "networks.lora"}
