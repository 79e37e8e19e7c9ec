"""What ``inspect`` found, as a record and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ..formats.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Least, median and greatest of some numbers; zeros where there are none."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of ``values``."""
        return cls(min=min(values, default=0), median=median(values) if values else 0, max=max(values, default=0))

    def __str__(self) -> str:
        if self.min == self.max:
            return f"{self.median:g}"
        return f"{self.min:g} … {self.max:g}, median {self.median:g}"


@dataclass(frozen=True, kw_only=True)
class LoraPart:
    """What a LoRA does to the UNet or to a text encoder. Spreads are over the modules that have a rank or an alpha."""

    modules: int
    rank: Spread
    alpha: Spread
    scale: Spread
    """alpha / rank, the factor of a low-rank change."""
    norm: float
    """‖ΔW‖, the Frobenius norm of the change, without the kinds that depend on the base's weight."""


@dataclass(frozen=True, kw_only=True)
class InspectReport:
    """What ``inspect`` found; fields that do not apply to its ``kind`` are None or empty."""

    kind: str
    """``lora``, ``image``, or ``DetectedCheckpoint.kind``."""
    title: str | None = None
    """What it is, such as ``Flux checkpoint``, if sdlora can use it neither as a LoRA nor as a base."""
    file: str
    family: str | None
    format: str
    """Format of the tensors' names: ``LoraFile.format`` or ``DetectedCheckpoint.format``."""
    modules: dict[str, int]
    """Part -> number of modules of a LoRA, or of tensors of a checkpoint."""
    kinds: dict[str, int] | None = None
    """Kind of change -> number of modules of a LoRA."""
    parts: dict[str, LoraPart] | None = None
    """The parts that a LoRA changes."""
    rank: Spread | None = None
    alpha: Spread | None = None
    scale: Spread | None = None
    norm: dict[str, float] | None = None
    """Part -> Frobenius norm of the change."""
    dtype: str | None
    prediction: str | None
    prediction_source: str | None = None
    """What a checkpoint's prediction type is known from (``DetectedCheckpoint.prediction_source``)."""
    zero_terminal_snr: bool | None = None
    resolution: int | None = None
    """Side in pixels of the square image that a checkpoint was made for."""
    parameters: dict[str, int] | None = None
    """Part -> number of parameters of a checkpoint."""
    ema_tensors: int | None = None
    embeddings: tuple[str, ...] = ()
    """Names of the embeddings that are bundled with a LoRA."""
    trigger: tuple[str, ...] = ()
    tags: dict[str, int] | None = None
    """Tag -> how often it occurs in the captions that a LoRA was trained on, the most frequent first."""
    problems: tuple[str, ...]
    """What is wrong with the file, or why it cannot be used."""
    notes: tuple[str, ...] = ()
    """What is worth knowing and not wrong."""
    hashes: dict[str, str]
    metadata: dict[str, str]
    recipe: Recipe | None = None
    """What an image was made with."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names, except that ``format`` has another key, which programs know."""
        return {_KEYS.get(name, name): value for name, value in asdict(self).items()}


_KEYS = {"format": "dialect"}
LINES_OF_PROBLEMS = 12
TAGS_SHOWN = 12


def as_text(report: InspectReport) -> str:
    """Lines to print; long lists are cut, and ``to_json`` has them whole."""
    if report.kind == "image":
        recipe = report.metadata.get("parameters", "").splitlines()
        first = f"{report.file}: image, {report.format}"
        notes = [f"note: {note}" for note in report.notes] + [f"problem: {problem}" for problem in report.problems]
        return "\n".join([first, *(f"  {line}" for line in (*recipe, *notes))])
    names = "" if report.format == "unknown" else f", {report.format} names"
    what = report.title or f"{report.kind}, {report.family or 'unknown family'}"
    lines = [f"{report.file}: {what}{names}"]
    facts = [(label, text) for label, text in _facts(report) if text]
    width = max((len(label) for label, _ in facts), default=0)
    lines += [f"  {label:<{width}}  {text}" for label, text in facts]
    lines += [f"  note: {note}" for note in report.notes]
    lines += [f"  problem: {problem}" for problem in report.problems[:LINES_OF_PROBLEMS]]
    if (more := len(report.problems) - LINES_OF_PROBLEMS) > 0:
        lines.append(f"  … and {more} more problems, all with --json")
    return "\n".join(lines)


def _facts(report: InspectReport) -> list[tuple[str, str]]:
    """(label, text) in the order in which they are shown; an empty text is left out."""
    counts = ", ".join(f"{part} {count}" for part, count in report.modules.items() if count)
    kinds = report.kinds if report.kinds and set(report.kinds) != {"lora"} else {}
    source = f" (from the {report.prediction_source})" if report.prediction_source else ""
    terminal = ", zero-terminal SNR" if report.zero_terminal_snr else ""
    tags = list((report.tags or {}).items())
    more = f", and {len(tags) - TAGS_SHOWN} more" if len(tags) > TAGS_SHOWN else ""
    return [
        (
            "modules" if report.kind == "lora" else "tensors",
            f"{counts} ({report.dtype})" if counts else report.dtype or "",
        ),
        ("kinds", ", ".join(f"{kind} {count}" for kind, count in kinds.items())),
        ("embeddings", f"{', '.join(report.embeddings)} (bundled, not applied)" if report.embeddings else ""),
        ("parameters", ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in (report.parameters or {}).items())),
        *((part, _part_text(found)) for part, found in (report.parts or {}).items()),
        ("prediction", f"{report.prediction}{source}{terminal}" if report.prediction else ""),
        ("image size", f"{report.resolution} x {report.resolution} pixels" if report.resolution else ""),
        ("EMA", f"{report.ema_tensors} tensors of averaged weights, not used" if report.ema_tensors else ""),
        ("trigger", ", ".join(report.trigger)),
        ("tags", ", ".join(f"{tag} {count}" for tag, count in tags[:TAGS_SHOWN]) + more),
        *report.hashes.items(),
    ]


def _part_text(part: LoraPart) -> str:
    return f"rank {part.rank}; alpha {part.alpha}; scale {part.scale}; ‖ΔW‖ {part.norm:.3g}"
