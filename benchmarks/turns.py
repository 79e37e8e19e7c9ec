"""What benchmarks share: sides that take turns in one run, ratios taken round by round, and the conditions of a run."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Times = Mapping[str, Sequence[float]]
"""Side -> seconds in each round."""


def conditions(**more: object) -> dict[str, object]:
    """The machine, the versions, and whatever else decides what is measured."""
    versions = {}
    for package in ("torch", "diffusers", "transformers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "python": platform.python_version(),
        **versions,
        **more,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, '') or platform.processor() or 'CPU'} ({platform.machine()})"


def _load() -> float | str:
    """Processes that waited for a core in the last minute, on average: far above the cores, times mean little."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown"


def seconds(work: Callable[[], object]) -> float:
    """What ``work`` takes, on a GPU with all that it has started."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int, *, warmups: int = 1) -> dict[str, list[float]]:
    """The seconds that each side returns, one after another in each round; those of the first ``warmups`` do not count."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(warmups + rounds):
        for side, measured in sides.items():
            took = measured()
            if number >= warmups:
                times[side].append(took)
    return times


def ratio(times: Times, one: str, other: str) -> list[float]:
    """Median, least and most of ``one`` / ``other``, taken round by round: what slows a machine slows both."""
    ratios = sorted(a / b for a, b in zip(times[one], times[other], strict=True))
    return [significant(r) for r in (statistics.median(ratios), ratios[0], ratios[-1])]


def median(values: Sequence[float]) -> float:
    """To three digits."""
    return significant(statistics.median(values))


def significant(value: float) -> float:
    """``value`` to three digits."""
    return float(f"{value:.3g}")


def print_results(stated: Mapping[str, object], rows: Sequence[Mapping[str, object]], *, as_json: bool) -> None:
    """The conditions and the table, as text or as one JSON object."""
    if as_json:
        print(json.dumps({"conditions": stated, "rows": rows}), flush=True)
        return
    print(", ".join(f"{name} {value}" for name, value in stated.items()))
    if any(isinstance(value, list) for row in rows for value in row.values()):
        print("ratios: median [least, most] of the rounds")
    print(f"\n{table(rows)}", flush=True)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """``rows`` as Markdown; a list of three is a median with the least and the most."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, list):
        middle, least, most = value
        return f"{middle:g} [{least:g}, {most:g}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
