"""Where the time of a training step goes: ours against the floor, by kind of operation.

    python -m benchmarks.profile_step [--base mini | sd1 | sdxl | FILE] [--resolution 256] [--batch 1] [--steps 2]

The sides are those of ``benchmarks.train_step``. torch's profiler says how long each operation took itself, without those
that it called; on a GPU, how long its kernels did. The sides take turns, so that a busy machine slows both.
``outside operations`` is the rest of the step: Python, the profiler itself, and on a GPU the time in which it waits.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_step import SIDES, Setting, Step, add_options, open_setting, step_of
from benchmarks.turns import conditions, print_results, seconds, significant

KINDS = {
    "matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm", "linear"),
    "convolutions": ("convolution", "conv2d"),
    "attention": ("attention", "softmax"),
    "norms": ("group_norm", "layer_norm"),
    "activations": ("silu", "gelu", "sigmoid"),
    "copies and casts": ("copy_", "clone", "::cat", "_to_copy", "contiguous"),
    "optimizer": ("_fused_", "_foreach_", "linalg_vector_norm"),
    "sums and products by element": ("::add", "::mul", "::div", "::sub", "::sum", "::mean", "::neg", "::pow"),
}
"""Kind -> parts of the names of its operations, the first that fits."""
TURNS = 3
OTHER, OUTSIDE = "others", "outside operations"


def kind_of(operation: str) -> str:
    """The kind of an operation as torch's profiler names it, such as ``aten::addmm``."""
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), OTHER)


def profiled(step: Step, steps: int) -> Counter[str]:
    """Milliseconds of one step for each kind of operation, on average over ``steps``."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def work() -> None:
        for _ in range(steps):
            step()

    with profile(activities=activities) as profiler:
        whole = seconds(work)
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.key.startswith("aten::") or on_gpu:
            took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[kind_of(event.key)] += took / 1000 / steps
    spent[OUTSIDE] = max(0.0, 1000 * whole / steps - spent.total())
    return spent


def compare(setting: Setting, sides: Sequence[str], steps: int) -> dict[str, Counter[str]]:
    """For each side, the means of ``TURNS`` turns of ``steps`` steps."""
    work = {side: step_of(side, setting) for side in sides}
    for step in work.values():
        step()
    spent: dict[str, Counter[str]] = {side: Counter() for side in sides}
    for _ in range(TURNS):
        for side, step in work.items():
            spent[side] += profiled(step, steps)
    return {side: Counter({kind: took / TURNS for kind, took in times.items()}) for side, times in spent.items()}


def table(spent: Mapping[str, Counter[str]]) -> list[dict[str, object]]:
    """A row for each kind, the most expensive first, and one for all; shares are of the first side's step."""
    name, first = next(iter(spent.items()))
    kinds = sorted((*KINDS, OTHER, OUTSIDE), key=lambda kind: -first[kind])
    taken = {kind: {side: times[kind] for side, times in spent.items()} for kind in kinds}
    taken["all"] = {side: times.total() for side, times in spent.items()}
    return [
        {"operations": kind}
        | {f"{side}, ms": significant(milliseconds) for side, milliseconds in sides.items()}
        | {f"share of {name}, %": significant(100 * sides[name] / first.total())}
        for kind, sides in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="profiled in each turn")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "floor"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setting = open_setting(arguments, Path(folder), arguments.batch)
        spent = compare(setting, arguments.sides, arguments.steps)
    stated = conditions(
        base=arguments.base,
        resolution=setting.resolution,
        batch=arguments.batch,
        rank=arguments.rank,
        dtype=str(setting.base.dtype).removeprefix("torch."),
    )
    print_results(stated, table(spent), as_json=arguments.json)


if __name__ == "__main__":
    main()
