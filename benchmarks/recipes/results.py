"""Results as lines of JSON, and tables of them: mean ± half of the 95 % interval."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Two-sided 95 % quantiles of Student's t, for 1 to 15 degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run measured."""

    name: str
    style: str
    """The sample set."""
    seed: int
    conditions: str
    """How it was trained and measured; with the three above, what says whether a run is done already."""
    seconds: float
    held_out: list[float]
    """Losses at each noise level."""
    neutral: list[float]
    measures: dict[str, float]

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What no two results share."""
        return self.name, self.style, self.seed, self.conditions

    def value(self, column: str) -> float | None:
        """By the name of a column; None where it was not measured."""
        losses = {"held-out loss": self.held_out, "neutral loss": self.neutral}
        if column in losses:
            return statistics.fmean(losses[column]) if losses[column] else None
        return self.measures.get(column)


def read(file: Path) -> list[Result]:
    """Every whole line; a torn last one, left by an interruption, does not count."""
    results = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            results.append(Result(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return results


def append(file: Path, result: Result) -> None:
    """Add a line, after ending one that is torn."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    with file.open("a", encoding="utf-8") as target:
        target.write(("\n" if text and not text.endswith("\n") else "") + json.dumps(asdict(result)) + "\n")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean of ``count`` values, and half of its 95 % interval; None of a single value."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """None without values."""
        if not values:
            return None
        count = len(values)
        if count == 1:
            return cls(mean=values[0], half=None, count=1)
        quantile = T_95[min(count - 1, len(T_95)) - 1]
        half = quantile * statistics.stdev(values) / math.sqrt(count)
        return cls(mean=statistics.fmean(values), half=half, count=count)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant in a table."""

    name: str
    runs: int
    cells: Mapping[str, Estimate | None]


COLUMNS = ("held-out loss", "style", "style shown", "subject kept", "neutral loss", "neutral moved",
           "neutral subject kept", "neutral style")  # fmt: skip
RATIO = "of the reference's"


def rows(results: Iterable[Result], names: Sequence[str], reference: str) -> list[Row]:
    """One for each of ``names`` with results; losses are also given as ratios, run by run, to those of ``reference``."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    own = {(result.style, result.seed): result for result in by_name.get(reference, [])}
    table = []
    for name in names:
        runs = by_name.get(name, [])
        if not runs:
            continue
        pairs = [(run, own[run.style, run.seed]) for run in runs if (run.style, run.seed) in own]
        ratios = [statistics.fmean(run.held_out) / statistics.fmean(other.held_out) for run, other in pairs]
        cells = {column: Estimate.of([v for run in runs if (v := run.value(column)) is not None]) for column in COLUMNS}
        table.append(Row(name=name, runs=len(runs), cells={RATIO: Estimate.of(ratios), **cells}))
    return table


def as_text(table: Sequence[Row]) -> str:
    """A table in Markdown, without columns that nothing was measured for."""
    columns = [c for c in (RATIO, *COLUMNS) if any(row.cells[c] for row in table)]
    lines = ["| variant | runs | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in table:
        cells = ["" if row.cells[column] is None else str(row.cells[column]) for column in columns]
        lines.append(f"| {row.name} | {row.runs} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_json(table: Sequence[Row]) -> list[dict[str, object]]:
    """The same numbers for programs."""
    return [
        {"variant": row.name, "runs": row.runs} | {c: None if e is None else asdict(e) for c, e in row.cells.items()}
        for row in table
    ]
