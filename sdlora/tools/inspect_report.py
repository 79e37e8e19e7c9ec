"""What ``inspect`` found, as a record and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Spread:
    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Zeros where there are none."""
        return cls(min=min(values, default=0), median=median(values) if values else 0, max=max(values, default=0))

    def __str__(self) -> str:
        if self.min == self.max:
            return f"{self.median:g}"
        return f"{self.min:g} … {self.max:g}, median {self.median:g}"


@dataclass(frozen=True, kw_only=True)
class LoraPart:
    """What a LoRA does to the UNet or to a text encoder. Spreads are over the modules that have such a number."""

    modules: int
    rank: Spread
    alpha: Spread
    scale: Spread
    """alpha / rank, by which a low-rank change is multiplied."""
    norm: float
    """Frobenius norm of the change; kinds that depend on the base's weight are not in it."""


@dataclass(frozen=True, kw_only=True)
class InspectReport:
    """What ``inspect`` found; fields that do not apply to its ``kind`` are None or empty."""

    kind: str
    """``lora`` or ``checkpoint``."""
    file: str
    family: str | None
    dialect: str
    modules: dict[str, int]
    kinds: dict[str, int] | None = None
    """Kind of change -> number of modules, of a LoRA."""
    parts: dict[str, LoraPart] | None = None
    """Of a LoRA, those that it changes."""
    rank: Spread | None = None
    alpha: Spread | None = None
    scale: Spread | None = None
    norm: dict[str, float] | None = None
    """Frobenius norm of the change, over all modules of a part."""
    dtype: str | None
    prediction: str | None
    prediction_source: str | None = None
    """By what a checkpoint's prediction type was told."""
    zero_terminal_snr: bool | None = None
    resolution: int | None = None
    """Side in pixels of the square image that a checkpoint was made for."""
    parameters: dict[str, int] | None = None
    """Of a checkpoint, by part."""
    ema_tensors: int | None = None
    embeddings: tuple[str, ...] = ()
    """Bundled with a LoRA."""
    trigger: tuple[str, ...] = ()
    tags: dict[str, int] | None = None
    """How often each tag stood in the captions that a LoRA was trained on, the most frequent first."""
    problems: tuple[str, ...]
    """What is wrong with it, or why it cannot be used."""
    notes: tuple[str, ...] = ()
    """What is worth knowing and does no harm."""
    hashes: dict[str, str]
    metadata: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


LINES_OF_PROBLEMS = 12
TAGS_SHOWN = 12


def as_text(report: InspectReport) -> str:
    """For people; what is longer than a screen is cut, and ``to_json`` has it whole."""
    lines = [f"{report.file}: {report.kind}, {report.family or 'unknown family'}, {report.dialect} names"]
    facts = [(label, text) for label, text in _facts(report) if text]
    width = max(8, *(len(label) for label, _ in facts))
    lines += [f"  {label:<{width}} {text}" for label, text in facts]
    lines += [f"  note: {note}" for note in report.notes]
    lines += [f"  problem: {problem}" for problem in report.problems[:LINES_OF_PROBLEMS]]
    if (more := len(report.problems) - LINES_OF_PROBLEMS) > 0:
        lines.append(f"  … and {more} more problems, all with --json")
    return "\n".join(lines)


def _facts(report: InspectReport) -> list[tuple[str, str]]:
    """(label, text) in the order in which they are shown; an empty text is left out."""
    counts = ", ".join(f"{part} {count}" for part, count in report.modules.items() if count)
    kinds = report.kinds if report.kinds and set(report.kinds) != {"lora"} else {}
    source = f" (by {report.prediction_source})" if report.prediction_source else ""
    terminal = ", zero-terminal SNR" if report.zero_terminal_snr else ""
    tags = list((report.tags or {}).items())
    more = f", and {len(tags) - TAGS_SHOWN} more" if len(tags) > TAGS_SHOWN else ""
    return [
        ("modules" if report.kind == "lora" else "tensors", f"{counts} ({report.dtype})"),
        ("kinds", ", ".join(f"{kind} {count}" for kind, count in kinds.items())),
        ("bundled", f"{', '.join(report.embeddings)} (embeddings, not applied)" if report.embeddings else ""),
        ("numbers", ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in (report.parameters or {}).items())),
        *((part, _of_part(found)) for part, found in (report.parts or {}).items()),
        ("predicts", f"{report.prediction}{source}{terminal}" if report.prediction else ""),
        ("made for", f"{report.resolution} x {report.resolution} pixels" if report.resolution else ""),
        ("EMA", f"{report.ema_tensors} tensors of averaged weights, not read" if report.ema_tensors else ""),
        ("trigger", ", ".join(report.trigger)),
        ("tags", ", ".join(f"{tag} {count}" for tag, count in tags[:TAGS_SHOWN]) + more),
        *report.hashes.items(),
    ]


def _of_part(part: LoraPart) -> str:
    return f"rank {part.rank}; alpha {part.alpha}; scale {part.scale}; change {part.norm:.3g}"
