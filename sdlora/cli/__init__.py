"""The command line, one file for each verb. A verb imports what it needs when it runs, so ``--help`` is fast."""

from __future__ import annotations

import gc
import os
import sys

# Read when torch is imported. OpenMP threads that spin while they wait slow a step a hundred times when another process
# is busy; threads that sleep at once halve the speed of small steps. So they spin for some 50 microseconds, then sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Read when diffusers and transformers are imported, which happens late. sdlora reports what they warn about itself.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# isort: off  (the order of --help)
from . import (
    average,
    bake,
    cache,
    caption,
    convert,
    diff,
    export,
    extract,
    generate,
    grid,
    init,
    inspect,
    interference,
    lint,
    list,
    merge,
    metadata,
    plan,
    quickstart,
    resize,
    settings,
    sweep,
    train,
)

# isort: on
from .app import app

__all__ = [
    "app",
    "average",
    "bake",
    "cache",
    "caption",
    "convert",
    "diff",
    "export",
    "extract",
    "generate",
    "grid",
    "init",
    "inspect",
    "interference",
    "lint",
    "list",
    "main",
    "merge",
    "metadata",
    "plan",
    "quickstart",
    "resize",
    "settings",
    "sweep",
    "train",
]


def main() -> None:
    """The ``sdlora`` command. Exit codes: 0 done, 1 input at fault, 2 usage, 3 another process of the run has ended, 130
    interrupted after a safe save."""
    # Imports make hundreds of thousands of objects that all stay. Looking through them for garbage every 700 objects
    # takes a fifth of a start (``benchmarks/start.py``).
    gc.set_threshold(100_000, 20, 20)
    # diffusers imports peft where it finds it, a third of a second for a package that no verb uses.
    sys.modules.setdefault("peft", None)  # ty: ignore[no-matching-overload]
    try:
        app()
    except SystemExit as end:
        _end_with_gloo(end.code)
        raise


def _end_with_gloo(code: object) -> None:
    """End a process that shares its steps with others on CPUs at once.

    Threads of gloo let go of tensors a moment after they were summed. While Python shuts down, that ends the process with
    SIGABRT, and torch has no call that waits for these threads.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_backend() != "gloo":
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
