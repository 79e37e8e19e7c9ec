"""The results of a sweep in one table: ``results.csv``, ``results.json``, and lines for a terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..aligned import aligned
from ..config.toml_text import toml_value
from ..errors import TargetError
from ..files import printable, write_whole

State = Literal["waiting", "running", "done", "stopped", "failed"]
CSV_NAME, JSON_NAME = "results.csv", "results.json"
_COLUMNS = ("run", "state", "steps", "loss", "validation_loss", "seconds", "file", "message")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One line of the table."""

    run: str
    """Name of the run, and of its folder."""
    state: State
    settings: Mapping[str, Any]
    """``section.key`` -> value as TOML has it, of what sets it apart."""
    steps: int = 0
    """Steps that are done and kept."""
    loss: float | None = None
    """Mean over the last 10 % of the steps; None until it is done."""
    validation_loss: float | None = None
    """Mean over the validation images; None without such images."""
    seconds: float = 0.0
    """Time of its processes, in all calls."""
    file: str | None = None
    """The LoRA file, seen from the folder of the sweep; None until it is there."""
    message: str = ""
    """Why it failed, or a warning of a run that is done."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return {**vars(self), "settings": dict(self.settings)}


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What a sweep has done so far."""

    folder: Path
    runs: tuple[RunResult, ...]
    """In the order of the sweep file."""

    def count(self, state: State) -> int:
        """Number of runs in ``state``."""
        return sum(run.state == state for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """The folder, the number of runs in each state, and every run."""
        counts = {state: self.count(state) for state in get_args(State)}
        return {"folder": printable(self.folder), **counts, "runs": [run.to_json() for run in self.runs]}


def write_results(report: SweepReport) -> None:
    """Write both files, each whole. Raises ``OSError`` where that cannot be done."""
    runs = [run.to_json() for run in report.runs]
    text = json.dumps({"runs": runs}, ensure_ascii=False, indent=2, allow_nan=True)
    write_whole(report.folder / JSON_NAME, text.encode(), b"\n", durable=False)
    write_whole(report.folder / CSV_NAME, _as_csv(report.runs).encode(), durable=False)


def read_results(folder: Path) -> dict[str, RunResult]:
    """Name -> result, of what an earlier call wrote; nothing where there was none.

    Raises:
        TargetError: a file of that name is no table of results.
    """
    file = folder / JSON_NAME
    try:
        return {entry["run"]: RunResult(**entry) for entry in json.loads(file.read_bytes())["runs"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        raise TargetError(
            f"{printable(file)}: exists and has no results of a sweep; move it, or choose another --out"
        ) from None


def table_lines(runs: Sequence[RunResult]) -> list[str]:
    """The table for a terminal, without columns in which every cell would be empty."""
    rows = [("run", "state", "steps", "loss", "validation", "time")]
    rows += [
        (
            run.run,
            run.state,
            str(run.steps or ""),
            number(run.loss),
            number(run.validation_loss),
            f"{run.seconds:.0f} s" if run.seconds else "",
        )
        for run in runs
    ]
    return table(rows, right=("steps", "loss", "validation", "time"))


def table(rows: Sequence[Sequence[str]], *, right: Collection[str]) -> list[str]:
    """``rows``, the first of which has the titles, as aligned lines without empty columns; those named in ``right`` are
    aligned to the right."""
    shown = [cells for cells in zip(*rows, strict=True) if any(cells[1:])]
    return aligned(list(zip(*shown, strict=True)), right=right)


def number(value: float | None) -> str:
    """A loss with four decimals; "" for None."""
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else str(value)


def _as_csv(runs: Sequence[RunResult]) -> str:
    """A line for each run; its settings are columns, so that a program for tables can group by them."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_COLUMNS[:2], *keys, *_COLUMNS[2:]])
    for run in runs:
        cells = run.to_json()
        settings = [_cell(run.settings.get(key)) for key in keys]
        writer.writerow([*(_cell(cells[c]) for c in _COLUMNS[:2]), *settings, *(_cell(cells[c]) for c in _COLUMNS[2:])])
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.7g}" if isinstance(value, float) else toml_value(value)
