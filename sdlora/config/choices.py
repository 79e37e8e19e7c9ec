"""Values of settings that other wings offer too; without a third-party package, since ``--help`` reads it."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["auto", "float32", "bfloat16", "float16"]
"""Number formats in which a frozen base computes."""
PRECISIONS: tuple[str, ...] = get_args(Precision)
