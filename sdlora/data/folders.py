"""The folders of a set as they are listed, before any file in them is opened."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .findings import Finding

NOT_SEARCHED = frozenset({"mask", "__MACOSX", "__pycache__"})
"""Folders that hold no pictures to train on; neither do those whose name begins with a dot."""
HIGH_REPEATS = 200
"""From here on a number in front of a folder's name is more likely a year."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One folder, and what its name tells of the pictures in it."""

    path: Path
    name: str
    """Path within the set's folder, with ``/``; the empty text for that folder itself."""
    files: tuple[str, ...]
    """Names, sorted, less hidden ones."""
    repeats: int
    class_prompt: str | None

    def within(self, file: str) -> str:
        """The path of ``file`` within the set's folder."""
        return f"{self.name}/{file}" if self.name else file


def shown(path: Path) -> str:
    """``path`` as it can be printed anywhere."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def folded(name: str) -> str:
    """``name`` in one spelling of its accents: macOS writes them as letters of their own."""
    return unicodedata.normalize("NFC", name)


def list_folders(root: Path, *, subfolders: bool) -> tuple[tuple[Folder, ...], tuple[Finding, ...]]:
    """``root`` and, with ``subfolders``, those within it, each once, in the order of their names.

    A folder ``10_name`` below ``root`` gives its pictures 10 repeats and the class prompt ``name``, as kohya's trainer
    has it; so do the folders within it, down to the next of that kind.
    """
    findings: list[Finding] = []
    seen: set[str] = set()

    def walk(path: Path, name: str, repeats: int, class_prompt: str | None) -> Iterator[Folder]:
        real = os.path.realpath(path)
        if real in seen:
            return
        seen.add(real)
        files: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        (folders if entry.is_dir() else files).append(entry.name)
        except OSError as error:
            findings.append(
                Finding(
                    code="folder-unreadable",
                    severity="error",
                    file=shown(path),
                    message=f"this folder cannot be listed: {error.strerror}",
                    remedy="give yourself the right to read it, or move it away",
                )
            )
        yield Folder(path=path, name=name, files=tuple(sorted(files)), repeats=repeats, class_prompt=class_prompt)
        for folder in sorted(folders) if subfolders else ():
            if folder in NOT_SEARCHED:
                continue
            told = _repeat_folder(folder)
            if told and told[0] == 0:
                findings.append(
                    Finding(
                        code="repeats-zero",
                        severity="warning",
                        file=shown(path / folder),
                        message="0 repeats by its name, so its pictures are not used",
                        remedy="put the number of repeats in front of its name, or move it away",
                    )
                )
                continue
            if told and told[0] >= HIGH_REPEATS:
                findings.append(
                    Finding(
                        code="repeats-high",
                        severity="warning",
                        file=shown(path / folder),
                        message=f"{told[0]} repeats of each picture by its name",
                        remedy="rename the folder if that number is none of repeats",
                    )
                )
            inner = f"{name}/{folder}" if name else folder
            yield from walk(path / folder, inner, *(told or (repeats, class_prompt)))

    return tuple(walk(root, "", 1, None)), tuple(findings)


def _repeat_folder(name: str) -> tuple[int, str | None] | None:
    """(repeats, class prompt) of a folder that is named as kohya has it."""
    told = re.fullmatch(r"([0-9]{1,6})_(.*)", name)
    return (int(told[1]), told[2].strip() or None) if told else None
