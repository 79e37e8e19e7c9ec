"""The configuration of the LoRA: its size, and the modules it changes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .setting import Section, Setting


class LoraSection(Section):
    """The LoRA: its size, and the modules it changes."""

    rank: Annotated[int, Field(ge=1, le=1024), Setting(kohya="network_dim")] = 16
    """Rank of the change of each module. A higher rank can learn more, and makes a larger file."""
    alpha: Annotated[float, Field(gt=0), Setting(kohya="network_alpha")] = 8.0
    """The change of each module is scaled by alpha / rank. Keep the ratio when you change the rank, or adapt the
    learning rate."""
    targets: Literal["attention", "attention-mlp"] = "attention"
    """Modules that are changed: the attention projections q, k, v and out; or these and the feed-forward layers."""
