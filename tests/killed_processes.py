"""Training runs in processes of their own that kill themselves, by SIGKILL, at a chosen moment.

A server process that has imported everything forks one for each run, so a run costs no start of Python.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

PRELOADED = ["tests.killed_processes", "sdlora.training.loop", "sdlora.training.run", "pytorch_optimizer"]


def run(settings: list[str], *, kill_at: int | None, moments: Path) -> int:
    """Train by ``settings`` in a process of its own; returns its exit code, -9 if it was killed.

    The number of moments that passed is written to ``moments`` at the end. Moments are before each step, before each of
    its updates, and before and after each renaming, by which a file appears.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=train_until, args=(settings, kill_at, str(moments)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def train_until(settings: list[str], kill_at: int | None, moments: str) -> None:
    """What such a process does."""
    import torch

    import sdlora
    from sdlora.config.loading import load_config
    from sdlora.progress import Silence
    from sdlora.training.optimizer import GuardedAdamW
    from sdlora.training.session import TrainingSession

    torch.set_num_threads(1)
    passed = 0

    def moment() -> None:
        nonlocal passed
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    def watched(function: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        @wraps(function)
        def watching(*arguments: Any, **named: Any) -> Any:
            moment()
            result = function(*arguments, **named)
            if after:
                moment()
            return result

        return watching

    os.replace = watched(os.replace, after=True)
    TrainingSession.step = watched(TrainingSession.step, after=False)
    GuardedAdamW.step = watched(GuardedAdamW.step, after=False)
    sdlora.train(load_config(None, settings), progress=Silence())
    Path(moments).write_text(str(passed))
