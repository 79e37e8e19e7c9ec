"""Several LoRA files -> one that does what they do together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..errors import LoraFileError
from ..formats.hashes import file_hashes
from ..formats.lora_writer import write_lora
from ..formats.metadata import family_metadata, safe_title, stated_prediction, trigger_words
from ..generation.arguments import LoraArgument, constant_choices
from ..lora.change import Change
from ..lora.combining import EXACT, Cut, Spectrum, joined, plain, summed
from ..lora.kinds import Full
from ..lora.low_rank import LowRank
from ..lora.task_arithmetic import dare, mean, ties
from ..progress import Progress, progress_or_bar
from ..randomness import Stream, generator
from .named_lora import Modules, WeightedFile, check_new_lora, output_dtype, read_named, weighted_files

Method = Literal["concat", "svd", "linear", "ties", "dare"]


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What was merged."""

    output: str
    family: str
    method: str
    modules: int
    rank: tuple[int, int]
    """Lowest and highest rank; (0, 0) where every module holds a whole change."""
    energy: float
    """Least share of ‖ΔW‖² of a module that was kept; 1.0 where nothing was cut."""
    dtype: str
    left_out: tuple[str, ...]
    """What the sources hold and the output does not, as sentences."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    method: Method
    cut: Cut
    density: float
    seed: int


def merge(
    loras: LoraArgument | Sequence[LoraArgument],
    target: str | Path,
    *,
    method: Method = "concat",
    rank: int | None = None,
    energy: float | None = None,
    density: float = 0.5,
    seed: int = 0,
    base: str | None = None,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Merge:
    """Write one LoRA file that makes the changes of several together; files of any ranks, alphas and kinds.

    Args:
        loras: each ``FILE[:UNET[:TE]]``, a path or a ``LoraChoice``.
        method: ``concat`` is exact, and ranks add up. ``svd`` cuts the sum to ``rank`` or ``energy``. ``linear`` is the
            weighted mean, ``ties`` and ``dare`` are those of Yadav et al. (2023) and Yu et al. (2024), cut in the same way.
        rank: the highest rank of a module; without it and ``energy``, that of the highest source.
        energy: share of ‖ΔW‖² of each module that is kept, above 0 and up to 1.
        density: share of the numbers that ``ties`` and ``dare`` keep.
        seed: of what ``dare`` drops.
        base: a base checkpoint, where the files do not show whose modules they name, or their changes depend on its weights.
        precision: ``float16``, ``bfloat16`` or ``float32``; ``auto`` is the widest of the sources.
        progress: a bar on standard error by default.

    Raises:
        LoraFileError, BaseModelError: a source cannot be used, or the target exists. Nothing is written then.
    """
    target, choices = Path(target), constant_choices(loras)
    check_new_lora(target)
    _check(choices, method, rank, energy, density)
    with progress_or_bar(progress) as shown:
        modules, named = read_named([choice.file for choice in choices], base)
        sources = weighted_files(modules, choices, named)
        if method != "concat" and rank is None and energy is None:
            rank = max((change.rank or 0 for lora in named for change in lora.changes.values()), default=0) or None
        settings = _Settings(method=method, cut=Cut(rank=rank, energy=energy), density=density, seed=seed)
        dtype = output_dtype(precision, [lora.file for lora in named])
        names = sorted({name for lora in named for name in lora.changes})
        shown.start("Merging", len(names))
        merged, kept, lost = {}, [1.0], []
        for number, name in enumerate(names):
            found = _merged_module(name, number, sources, modules, settings)
            merged[name] = in_dtype(found.change, dtype)
            kept.append(found.energy)
            lost += found.left_out
            shown.advance()
        write_lora(
            target,
            merged,
            _metadata(target, sources, modules, settings),
            dtype=dtype,
            family=modules.family,
            base_modules=modules.shapes,
        )
    ranks = [change.rank for change in merged.values() if change.rank] or [0]
    return Merge(
        output=str(target),
        family=modules.family.name,
        method=method,
        modules=len(merged),
        rank=(min(ranks), max(ranks)),
        energy=min(kept),
        dtype=str(dtype).removeprefix("torch."),
        left_out=(*(problem for lora in named for problem in lora.file.problems), *lost),
    )


def _check(choices: Sequence[object], method: str, rank: int | None, energy: float | None, density: float) -> None:
    problems = []
    if not choices:
        problems.append("no LoRA file is named")
    if method not in get_args(Method):
        problems.append(f"method {method!r}: choose one of {', '.join(get_args(Method))}")
    if method == "concat" and (rank is not None or energy is not None):
        problems.append("concat is exact and cuts nothing; use --method svd with --rank or --energy")
    if not 0 < density <= 1:
        problems.append(f"density {density:g}: expected a share above 0, up to 1")
    problems += cut_problems(rank, energy)
    if problems:
        raise LoraFileError(problems)


def cut_problems(rank: int | None, energy: float | None) -> list[str]:
    """What is wrong with the limits of a cut, a sentence each."""
    problems = []
    if rank is not None and rank < 1:
        problems.append(f"rank {rank}: expected a whole number, at least 1")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy {energy:g}: expected a share above 0, up to 1")
    return problems


@dataclass(frozen=True, kw_only=True, eq=False)
class _Merged:
    change: Change
    energy: float = 1.0
    left_out: tuple[str, ...] = ()


def _merged_module(
    name: str, number: int, sources: Sequence[WeightedFile], modules: Modules, settings: _Settings
) -> _Merged:
    shape = modules.shapes[name]
    holders = [source for source in sources if name in source.lora.changes]
    changes = {str(source.lora.file.path): source.lora.changes[name] for source in holders}
    weighted = [(source.lora.changes[name], source.strength(name)) for source in holders]
    bias = _summed_bias(weighted)
    products = [(low, strength) for change, strength in weighted if (low := plain(change)) is not None]
    thin = bias is None and len(products) == len(weighted)
    if settings.method == "concat" and thin:
        return _Merged(change=joined(products, shape))
    if settings.method == "svd" and thin:
        return _cut(Spectrum.of_product(products, shape), settings.cut)
    weight = modules.weight(name, changes)
    delta = _combined(weighted, weight, number, settings)
    if len(shape) == 1:
        return _Merged(change=Full(diff=delta.float(), bias=bias, of_norm=True))
    if settings.method == "concat":
        return _Merged(change=_exact(delta, bias))
    lost = () if bias is None else (f"the bias of {name}: only --method concat keeps biases",)
    cut = _cut(Spectrum.of_matrix(delta), settings.cut)
    return _Merged(change=cut.change, energy=cut.energy, left_out=lost)


def _summed_bias(changes: Sequence[tuple[Change, float]]) -> torch.Tensor | None:
    moves = [
        strength * bias.float().flatten() for change, strength in changes if (bias := change.bias_delta()) is not None
    ]
    return torch.stack(moves).sum(0) if moves else None


def _combined(
    changes: Sequence[tuple[Change, float]], weight: torch.Tensor, number: int, settings: _Settings
) -> torch.Tensor:
    if settings.method in ("concat", "svd"):
        return summed(changes, weight)
    deltas = [(change.delta(weight.double()), strength) for change, strength in changes]
    methods: Mapping[str, Callable[[], torch.Tensor]] = {
        "linear": lambda: mean(deltas),
        "ties": lambda: ties(deltas, density=settings.density),
        "dare": lambda: dare(
            deltas, density=settings.density, rng=generator(settings.seed, Stream.MERGE_DROPOUT, number)
        ),
    }
    if settings.method == "linear" and sum(strength for _, strength in changes) == 0:
        raise LoraFileError(
            "--method linear: the weights of a module sum to 0, so they have no mean; use concat or svd"
        )
    return methods[settings.method]()


def _exact(delta: torch.Tensor, bias: torch.Tensor | None) -> Change:
    """Whole, or as a product where that is smaller."""
    outputs, inputs = delta.flatten(1).shape
    spectrum = Spectrum.of_matrix(delta)
    rank = Cut().kept(spectrum.values)
    if bias is None and rank * (outputs + inputs) < outputs * inputs and spectrum.energy(rank) > 1 - EXACT**2:
        return spectrum.cut(Cut(rank=rank))
    return Full(diff=delta.float(), bias=bias)


def _cut(spectrum: Spectrum, cut: Cut) -> _Merged:
    change = spectrum.cut(cut)
    return _Merged(change=change, energy=spectrum.energy(change.rank))


def in_dtype(change: Change, dtype: torch.dtype) -> Change:
    """``change``, low-rank or whole, with its tensors in ``dtype``: they need no more memory than the file then."""
    if isinstance(change, LowRank):
        even = change.evened() if dtype == torch.float16 else change
        return LowRank(down=even.down.to(dtype), up=even.up.to(dtype), alpha=change.alpha)
    assert isinstance(change, Full)
    return Full(
        diff=None if change.diff is None else change.diff.to(dtype),
        bias=None if change.bias is None else change.bias.to(dtype),
        of_norm=change.of_norm,
    )


def _metadata(target: Path, sources: Sequence[WeightedFile], modules: Modules, settings: _Settings) -> dict[str, str]:
    """Family, trigger words, and what was merged: names, weights and hashes, no paths."""
    stated = [source.lora.file.metadata for source in sources]
    words = dict.fromkeys(word for metadata in stated for word in trigger_words(metadata))
    predictions = {prediction for metadata in stated if (prediction := stated_prediction(metadata))}
    recipe = [
        {
            "name": source.choice.name,
            "unet": source.choice.unet,
            "text_encoder": source.choice.text_encoder,
            **({"blocks": source.choice.blocks.text} if source.choice.blocks else {}),
            "autov3": file_hashes(source.lora.file.weights).autov3,
        }
        for source in sources
    ]
    described = {
        **family_metadata(modules.family, predictions.pop() if len(predictions) == 1 else None),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": safe_title(target.stem),
        "modelspec.merged_from": ", ".join(source.choice.name for source in sources),
        "modelspec.trigger_phrase": ", ".join(words),
        "ss_network_module": "networks.lora",
        "ss_output_name": safe_title(target.stem),
        "sdlora_merge": json.dumps({"method": settings.method, "loras": recipe}, sort_keys=True),
    }
    return {key: value for key, value in described.items() if value}
