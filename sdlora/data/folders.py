"""Listing the folders of a set, without opening any file in them."""

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
"""A number in front of a folder's name that is at least this is more likely a year."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One folder, its files, and the settings that its name gives to its images."""

    path: Path
    name: str
    """Path within the set's folder, with ``/``; the empty text for that folder itself."""
    files: tuple[str, ...]
    """Names, sorted, without hidden ones."""
    repeats: int
    class_prompt: str | None

    @cached_property
    def by_stem(self) -> dict[str, tuple[str, ...]]:
        """Stem -> names that have it."""
        return _grouped(self.files, stem_of)

    @cached_property
    def by_small_letters(self) -> dict[str, tuple[str, ...]]:
        """Name in small letters -> names that differ from it in capitals alone."""
        return _grouped(self.files, lambda name: stem_of(name).lower() + extension_of(name))

    @cached_property
    def images(self) -> tuple[ListedImage, ...]:
        """Files that are images by their extension and not masks."""
        names = (name for name in self.files if extension_of(name) in EXTENSIONS and not self.is_mask_label(name))
        return tuple(ListedImage(folder=self, file_name=name) for name in names)

    def is_mask_label(self, name: str) -> bool:
        """Whether ``name`` is the mask of an image beside it, judged by its name."""
        stem = stem_of(name)
        beside = self.by_stem.get(stem.removesuffix(MASK_LABEL), ()) if stem.endswith(MASK_LABEL) else ()
        return extension_of(name) in EXTENSIONS and any(extension_of(other) in EXTENSIONS for other in beside)


@dataclass(frozen=True, kw_only=True)
class ListedImage:
    """An image file that is listed but not opened."""

    folder: Folder
    file_name: str

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.folder.path / self.file_name

    @property
    def name(self) -> str:
        """Its path within the set's folder, with ``/``."""
        return f"{self.folder.name}/{self.file_name}" if self.folder.name else self.file_name

    @property
    def stem(self) -> str:
        """``stem_of`` its name."""
        return stem_of(self.file_name)


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        found[key(name)] = (*found.get(key(name), ()), name)
    return found


def stem_of(name: str) -> str:
    """``name`` without its extension, accents in one encoding: macOS stores them as separate letters."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def extension_of(name: str) -> str:
    """Extension of ``name`` with its dot, in small letters."""
    return os.path.splitext(name)[1].lower()


def list_folders(root: Path, *, subfolders: bool, report: FindingCollector) -> tuple[Folder, ...]:
    """``root`` and, with ``subfolders``, the folders within it, each once, in the order of their names.

    A folder ``10_name`` below ``root`` gives its images 10 repeats and the class prompt ``name``, as in kohya's trainer;
    folders within it inherit both, down to the next of that kind.
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
            named = _repeat_folder(folder)
            if named and named[0] == 0:
                message = "its name says 0 repeats, so its images are not used"
                report.add("repeats-zero", path / folder, message, "write another number, or move it away", "warning")
                continue
            if named and named[0] >= HIGH_REPEATS:
                message = f"its name says {named[0]} repeats of each image"
                report.add("repeats-high", path / folder, message, "rename it if no repeats are meant", "warning")
            inner = f"{name}/{folder}" if name else folder
            yield from walk(path / folder, inner, *(named or (repeats, class_prompt)))

    return tuple(walk(root, "", 1, None))


def _entries(path: Path, report: FindingCollector) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files and of the folders in ``path`` that may be used, sorted."""
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
                    report.add("link-broken", path / entry.name, "a broken link", "repair or remove it")
    except OSError as error:
        message = f"this folder cannot be listed: {error.strerror}"
        report.add("folder-unreadable", path, message, "make it readable, or move it away")
    return tuple(sorted(files)), tuple(sorted(folders))


def _repeat_folder(name: str) -> tuple[int, str | None] | None:
    """(repeats, class prompt) of a folder that is named like kohya's, ``10_name``."""
    match = re.fullmatch(r"([0-9]{1,6})_(.*)", name)
    return (int(match[1]), match[2].strip() or None) if match else None
