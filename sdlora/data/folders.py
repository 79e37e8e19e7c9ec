"""The folders of a set as they are listed, before any file in them is opened."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..files import printable
from .decoding import EXTENSIONS
from .findings import FindingCollector

NOT_SEARCHED = frozenset({"mask", "__MACOSX", "__pycache__"})
"""Folders that hold no images to train on; neither do those whose name begins with a dot."""
MASK_LABEL = "-masklabel"
"""OneTrainer's mask of NAME.png is NAME-masklabel.png."""
HIGH_REPEATS = 200
"""From here on a number in front of a folder's name is more likely a year."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One folder, and what its name tells of the images in it."""

    path: Path
    name: str
    """Path within the set's folder, with ``/``; the empty text for that folder itself."""
    files: tuple[str, ...]
    """Names, sorted, less hidden ones."""
    repeats: int
    class_prompt: str | None

    @cached_property
    def by_stem(self) -> dict[str, tuple[str, ...]]:
        """Stem of a name -> every name that has it."""
        return _grouped(self.files, stem_of)

    @cached_property
    def by_small_letters(self) -> dict[str, tuple[str, ...]]:
        """A name in small letters -> every name that it is."""
        return _grouped(self.files, lambda name: stem_of(name).lower() + extension_of(name))

    @cached_property
    def images(self) -> tuple[ListedImage, ...]:
        names = (name for name in self.files if extension_of(name) in EXTENSIONS and not self.is_mask_label(name))
        return tuple(ListedImage(folder=self, file_name=name) for name in names)

    def is_mask_label(self, name: str) -> bool:
        """Whether ``name`` is the mask of an image beside it, by its name."""
        stem = stem_of(name)
        beside = self.by_stem.get(stem.removesuffix(MASK_LABEL), ()) if stem.endswith(MASK_LABEL) else ()
        return extension_of(name) in EXTENSIONS and any(extension_of(other) in EXTENSIONS for other in beside)


@dataclass(frozen=True, kw_only=True)
class ListedImage:
    """An image file that has been listed and nothing more."""

    folder: Folder
    file_name: str

    @property
    def path(self) -> Path:
        return self.folder.path / self.file_name

    @property
    def name(self) -> str:
        """Its path within the set's folder, with ``/``."""
        return f"{self.folder.name}/{self.file_name}" if self.folder.name else self.file_name

    @property
    def stem(self) -> str:
        return stem_of(self.file_name)


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        found[key(name)] = (*found.get(key(name), ()), name)
    return found


def stem_of(name: str) -> str:
    """``name`` less its extension, in one spelling of its accents: macOS writes them as letters of their own."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def extension_of(name: str) -> str:
    """With its dot, in small letters."""
    return os.path.splitext(name)[1].lower()


def list_folders(root: Path, *, subfolders: bool, report: FindingCollector) -> tuple[Folder, ...]:
    """``root`` and, with ``subfolders``, those within it, each once, in the order of their names.

    A folder ``10_name`` below ``root`` gives its images 10 repeats and the class prompt ``name``, as kohya's trainer
    has it; so do the folders within it, down to the next of that kind.
    """
    seen: set[str] = set()

    def walk(path: Path, name: str, repeats: int, class_prompt: str | None) -> Iterator[Folder]:
        real = os.path.realpath(path)
        if real in seen:
            return
        seen.add(real)
        files, folders = _entries(path, report)
        yield Folder(path=path, name=name, files=files, repeats=repeats, class_prompt=class_prompt)
        for folder in folders if subfolders else ():
            told = _repeat_folder(folder)
            if told and told[0] == 0:
                message = "0 repeats by its name, so its images are not used"
                report.add("repeats-zero", path / folder, message, "name another number, or move it away", "warning")
                continue
            if told and told[0] >= HIGH_REPEATS:
                message = f"{told[0]} repeats of each image by its name"
                report.add("repeats-high", path / folder, message, "rename it if no repeats are meant", "warning")
            inner = f"{name}/{folder}" if name else folder
            yield from walk(path / folder, inner, *(told or (repeats, class_prompt)))

    return tuple(walk(root, "", 1, None))


def _entries(path: Path, report: FindingCollector) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files and of the folders in ``path`` that may be of use, sorted."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if printable(Path(entry.name)) != entry.name:
                    report.add("name-not-utf8", path / entry.name, "a name that is not UTF-8", "rename it")
                elif entry.is_dir():
                    folders += [] if entry.name in NOT_SEARCHED else [entry.name]
                elif entry.is_file():
                    files.append(entry.name)
                elif extension_of(entry.name) in EXTENSIONS:
                    report.add("link-broken", path / entry.name, "a link to nothing", "mend or remove it")
    except OSError as error:
        message = f"this folder cannot be listed: {error.strerror}"
        report.add("folder-unreadable", path, message, "give yourself the right to read it, or move it away")
    return tuple(sorted(files)), tuple(sorted(folders))


def _repeat_folder(name: str) -> tuple[int, str | None] | None:
    """(repeats, class prompt) of a folder that is named as kohya has it."""
    told = re.fullmatch(r"([0-9]{1,6})_(.*)", name)
    return (int(told[1]), told[2].strip() or None) if told else None
