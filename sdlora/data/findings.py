"""What is wrong with a dataset, or worth knowing of it: one record for each fault, all of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import DataError

Severity = Literal["error", "warning", "note"]
"""An error stops training, a warning is told, a note is told by ``lint`` alone."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of one file, or of the whole set where ``file`` is None."""

    code: str
    """Lower-case words joined by hyphens, ``caption-missing``; the same in every version."""
    severity: Severity
    file: str | None
    """As the user can find it: the folder as it was named, and the path within."""
    message: str
    """What is the case, with the numbers that show it."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.file or 'dataset'}: {self.message}; {self.remedy}"


def raise_errors(findings: Iterable[Finding]) -> None:
    """Raise ``DataError`` with a line for each error among ``findings``; do nothing where there is none."""
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError(errors)
