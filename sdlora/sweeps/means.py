"""Means over seeds: which of the other settings made a difference that a seed does not make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.toml_text import toml_value
from .results import RunResult, number, table

SEED = "train.seed"


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Runs that are done and differ in the seed alone."""

    runs: str
    """Their common name, without the seed."""
    settings: Mapping[str, Any]
    """What they share, as ``RunResult.settings``."""
    seeds: int
    loss: float | None
    loss_interval: float | None
    """Half of the 95 % confidence interval of the mean, by Student's t."""
    validation_loss: float | None
    validation_loss_interval: float | None

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return {**vars(self), "settings": dict(self.settings)}


def means_of(runs: Sequence[RunResult]) -> tuple[Mean, ...]:
    """A mean for each two or more runs that are done and differ in ``train.seed`` alone, in the order of ``runs``."""
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        if run.state == "done" and SEED in run.settings:
            groups.setdefault(toml_value(_shared(run)), []).append(run)
    return tuple(_mean(group) for group in groups.values() if len(group) > 1)


def mean_lines(means: Sequence[Mean]) -> list[str]:
    """The means as a table for a terminal; nothing where there are none."""
    if not means:
        return []
    rows = [("mean over seeds", "seeds", "loss", "validation")]
    for mean in means:
        loss = _with_interval(mean.loss, mean.loss_interval)
        validation = _with_interval(mean.validation_loss, mean.validation_loss_interval)
        rows.append((mean.runs, str(mean.seeds), loss, validation))
    return table(rows, right=("seeds", "loss", "validation"))


def _shared(run: RunResult) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key != SEED}


def _mean(group: Sequence[RunResult]) -> Mean:
    parts = [part for part in group[0].run.split(",") if not re.fullmatch(r"(train\.)?seed=-?\d+", part)]
    loss, validation = ([getattr(run, name) for run in group] for name in ("loss", "validation_loss"))
    return Mean(
        runs=",".join(parts) or "all",
        settings=_shared(group[0]),
        seeds=len(group),
        loss=_average(loss),
        loss_interval=_interval(loss),
        validation_loss=_average(validation),
        validation_loss_interval=_interval(validation),
    )


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _interval(values: Sequence[float | None]) -> float | None:
    import numpy as np

    from ..training.interval import half_width

    known = [value for value in values if value is not None]
    return half_width(np.asarray(known)) if len(known) == len(values) else None


def _with_interval(value: float | None, interval: float | None) -> str:
    return number(value) if interval is None else f"{number(value)} ± {number(interval)}"
