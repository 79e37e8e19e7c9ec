"""Time of a training step on ``mini`` in 1 and 2 processes of one CPU thread each, and in 1 of 2 threads, in turns.

    python benchmarks/processes.py [--batch 4] [--steps 40] [--rounds 3]

The CPU time is that of the first process: on a busy machine it says what the clock cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = {"1 process": (1, 1), "2 processes": (2, 1), "1 process, 2 threads": (1, 2)}
"""Name -> number of processes, threads of each."""
FIRST = 10
"""Steps before the clock is read: losses are read every ten."""


def measure(batch: int, steps: int, answer: Path) -> None:
    """Train in this process, alone or as one of several, and write seconds and CPU seconds of a step to ``answer``."""
    import sdlora

    read: dict[int, tuple[float, float]] = {}
    settings = [
        f"train.steps={FIRST + steps}",
        f"train.batch_size={batch}",
        f"output.path={answer.with_suffix('.safetensors')}",
    ]
    config = sdlora.load_config(ROOT / "configs" / "quickstart-pixel.toml", settings)
    sdlora.train(
        config,
        restart=True,
        progress=sdlora.Silence(),
        on_step=lambda record: read.setdefault(record.step, (time.monotonic(), time.process_time())),
    )
    if read:  # Only the first process hears of the steps.
        spans = [(last - first) / steps for first, last in zip(read[FIRST], read[FIRST + steps], strict=True)]
        answer.write_text(json.dumps(spans))


def one_side(processes: int, threads: int, batch: int, steps: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a step."""
    from sdlora.training.launch import run_processes

    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        ended = run_processes(
            processes, [sys.executable, __file__, "--batch", str(batch), "--steps", str(steps), "--answer", str(answer)]
        )
        if ended.code:
            sys.exit("\n".join(ended.problems))
        clock, cpu = json.loads(answer.read_text())
        return clock, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="steps that are measured, a multiple of ten")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer is not None:
        measure(given.batch, given.steps, given.answer)
        return
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for _ in range(given.rounds):
        for name, (processes, threads) in SIDES.items():
            times[name].append(one_side(processes, threads, given.batch, given.steps))
    alone = [statistics.median(column) for column in zip(*times["1 process"], strict=True)]
    for name, each in times.items():
        clock, cpu = (statistics.median(column) for column in zip(*each, strict=True))
        print(
            f"{name}: {1000 * clock:.0f} ms a step ({alone[0] / clock:.2f} times as fast as 1 process), "
            f"{1000 * cpu:.0f} ms of CPU in the first process ({cpu / alone[1]:.2f} of 1 process)"
        )


if __name__ == "__main__":
    main()
