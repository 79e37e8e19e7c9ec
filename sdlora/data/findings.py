"""Faults and remarks about a dataset: one record for each, all reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import DataError
from ..files import printable

Severity = Literal["error", "warning", "note"]
"""An error stops training, a warning is shown before it, a note is shown by ``lint`` alone."""
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""Most serious first."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of one file, or of the whole set where ``file`` is None."""

    code: str
    """Lower-case words joined by hyphens, ``caption-missing``; the same in every version."""
    severity: Severity
    file: str | None
    """As the user can find it: the folder as it was named, and the path within."""
    message: str
    """What is the case, with the figures that show it."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.file or 'dataset'}: {self.message}; {self.remedy}"


class FindingCollector:
    """A list of findings that grows while a dataset is read."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, code: str, file: Path, message: str, remedy: str, severity: Severity = "error") -> None:
        """Add one finding about ``file``."""
        self.findings.append(
            Finding(code=code, severity=severity, file=printable(file), message=message, remedy=remedy)
        )


Check = tuple[str, Severity, object, str]
"""Code, severity, message, remedy; the message is a text, or false where there is no such fault."""


def findings_from(file: str | None, *checks: Check) -> Iterator[Finding]:
    """A finding about ``file`` for each of ``checks`` that has a message."""
    for code, severity, message, remedy in checks:
        if message:
            yield Finding(code=code, severity=severity, file=file, message=str(message), remedy=remedy)


def raise_errors(findings: Iterable[Finding]) -> None:
    """Do nothing where no finding is an error.

    Raises:
        DataError: with one line for each error.
    """
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError(errors)
