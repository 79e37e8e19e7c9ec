"""Names of what a training keeps beside its output until it is complete. Without torch, for those who only look."""

from __future__ import annotations

import re

RUN_SUFFIX = ".resume"
"""Suffix of the folder with checkpoints, in the place of that of the output."""


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after ``step`` steps; names sort as their steps do."""
    return f"step-{step:08}.safetensors"


def step_of_checkpoint(name: str) -> int | None:
    """The inverse of ``checkpoint_name``; None for other files."""
    match = re.fullmatch(r"step-([0-9]+)\.safetensors", name)
    return int(match[1]) if match else None
