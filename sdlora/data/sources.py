"""Which pictures there are and what is said of each, before any is opened: folders, caption files, tables of metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .captions import CaptionRules

Role = Literal["train", "regularisation", "validation"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A picture file with its captions and its part in training."""

    file: Path
    captions: tuple[str, ...]
    """Alternatives as they were found, less surrounding white space; () where there is none."""
    caption_file: Path | None
    """Where they stand; a table of metadata may hold those of many pictures."""
    rules: CaptionRules
    mask: Path | None
    role: Role
    repeats: int
    loss_weight: float
    """Of its set, times its own."""
