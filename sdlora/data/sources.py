"""Which pictures there are and what is said of each, before any is opened: folders, caption files, tables of metadata."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import DataSection, SetSection
from .captions import CaptionRules
from .findings import Finding, Severity
from .folders import Folder, folded, list_folders, shown
from .images import EXTENSIONS

Role = Literal["train", "regularisation", "validation"]

CAPTION_EXTENSIONS = (".txt", ".caption", ".cap", ".tags", ".json")
"""What caption files end in, of this trainer and others."""
UNREAD_EXTENSIONS = frozenset(
    {
        *(".psd", ".xcf", ".kra", ".svg", ".tga", ".exr", ".hdr", ".dds", ".jp2", ".heic", ".heif", ".avif", ".jxl"),
        *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".mp4", ".webm", ".mov", ".mkv", ".avi"),
    }
)
"""Pictures and films that are taken for training material by mistake, where no reader of them is installed."""
NO_CAPTIONS = frozenset({"readme", "license", "licence", "copying", "notice", "credits"})
"""Names of text files that belong to no picture."""
MASK_LABEL = "-masklabel"
"""OneTrainer's mask of NAME.png is NAME-masklabel.png."""
MAX_CAPTION_BYTES = 1 << 16
MAX_WORDS = 225
"""Three chunks of 75 tokens, the most that is read of a caption; a word is at least one."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A picture file with its captions and its part in training."""

    file: Path
    name: str
    """Its path within the folder of its set, with ``/``."""
    set_number: int
    """Which of the data section's resolved ``sets`` it belongs to, from 0."""
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


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Every picture, sets in the order of the configuration and files by their names, and what is wrong with them."""

    sources: tuple[Source, ...]
    findings: tuple[Finding, ...]


def resolve_data(data: DataSection) -> DataSection:
    """``data`` with every folder in ``sets``, however it was told of them; the same again where that is so already."""
    if data.images is None:
        return data
    only = SetSection(images=data.images, metadata=data.metadata)
    return data.model_copy(update={"images": None, "metadata": None, "sets": (only,)})


def caption_rules(one: SetSection, data: DataSection) -> CaptionRules:
    """The rules of the captions of a set."""

    def own(key: str) -> object:
        value = getattr(one, key)
        return getattr(data, key) if value is None else value

    none = "" if one.role == "regularisation" else data.trigger
    return CaptionRules(
        trigger=none if one.trigger is None else one.trigger,
        trigger_as=data.trigger_as,
        template=data.caption_template,
        prefix=data.caption_prefix if one.caption_prefix is None else one.caption_prefix,
        suffix=data.caption_suffix if one.caption_suffix is None else one.caption_suffix,
        replace=data.caption_replace,
        wildcards=data.wildcards if one.wildcards is None else one.wildcards,
        shuffle_tags=data.shuffle_tags if one.shuffle_tags is None else one.shuffle_tags,
        keep_tokens=data.keep_tokens if one.keep_tokens is None else one.keep_tokens,
        tag_dropout=data.tag_dropout if one.tag_dropout is None else one.tag_dropout,
    )


def find_sources(data: DataSection) -> Listing:
    """List every set of ``data``; nothing is raised for a fault of files, all of them are findings."""
    data = resolve_data(data)
    sources: list[Source] = []
    findings: list[Finding] = []
    for number, one in enumerate(data.sets):
        scan = _SetScan(number, one, data)
        sources += scan.sources()
        findings += scan.findings
    return Listing(sources=tuple(sources), findings=tuple(findings))


class _SetScan:
    """One set being listed."""

    def __init__(self, number: int, one: SetSection, data: DataSection):
        self._number, self._set, self._data = number, one, data
        self._root = Path(one.images)
        self._extension = "." + (one.caption_extension or data.caption_extension).lstrip(".").lower()
        self._lines = one.caption_lines or data.caption_lines
        self._rules = caption_rules(one, data)
        self.findings: list[Finding] = []

    def sources(self) -> list[Source]:
        if not self._root.is_dir():
            what = "not a folder" if self._root.exists() else "no such folder"
            self._find("folder-missing", self._root, what, "name the folder of training pictures")
            return []
        folders, findings = list_folders(self._root, subfolders=self._set.subfolders)
        self.findings += findings
        found = [source for folder in folders for source in self._of_folder(folder)]
        if not found:
            entries = sum(len(folder.files) for folder in folders)
            kinds = " ".join(sorted(EXTENSIONS))
            self._find("folder-empty", self._root, f"no picture among its {entries} files", f"expected {kinds}")
        return sorted(found, key=lambda source: source.name)

    def _of_folder(self, folder: Folder) -> Iterator[Source]:
        pictures = [name for name in folder.files if os.path.splitext(name)[1].lower() in EXTENSIONS]
        by_stem: dict[str, list[str]] = {}
        for name in folder.files:
            by_stem.setdefault(folded(os.path.splitext(name)[0]), []).append(name)
        for name in pictures:
            stem = folded(os.path.splitext(name)[0])
            captions = [n for n in by_stem[stem] if os.path.splitext(n)[1].lower() == self._extension]
            text: tuple[str, ...] = ()
            if captions:
                text = tuple((folder.path / captions[0]).read_text().splitlines())
            yield Source(
                file=folder.path / name,
                name=folder.within(name),
                set_number=self._number,
                captions=text,
                caption_file=folder.path / captions[0] if captions else None,
                rules=self._rules,
                mask=None,
                role=self._set.role,
                repeats=self._set.repeats * folder.repeats,
                loss_weight=self._set.loss_weight,
            )

    def _find(self, code: str, file: Path, message: str, remedy: str, severity: Severity = "error") -> None:
        self.findings.append(Finding(code=code, severity=severity, file=shown(file), message=message, remedy=remedy))
