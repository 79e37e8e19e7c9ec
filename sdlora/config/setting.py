"""What every field of a section states about itself at run time, beside its type, default and documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

Affects = Literal["weights", "samples", "text", "place", "nothing"]
"""What changes with a setting: the trained weights; the sample images; the text in the file; only where something is
read or written; nothing of the result, but time or memory."""

DECIDES_RESUMING: tuple[Affects, ...] = ("weights", "samples")
"""A half-done run resumes only if all settings that affect these are the same."""


class Section(BaseModel):
    """One table of the configuration; frozen, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The facts of a field that its type does not state; part of its ``Annotated`` type."""

    kohya: str | None = None
    """The option of kohya's trainer, or the key of its dataset configuration, that means the same."""
    affects: Affects = "weights"
    values: str = ""
    """Which values are possible, where the type does not say it well enough."""


def setting_of(field: FieldInfo) -> Setting:
    """The ``Setting`` in the type of ``field``; all defaults where it has none."""
    return next((entry for entry in field.metadata if isinstance(entry, Setting)), Setting())
