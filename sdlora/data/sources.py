"""Which images there are and what is said of each, before any is opened: folders, caption files, tables of metadata."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.resolve import resolve_data
from ..config.sections import DataSection, SetSection
from ..files import printable
from .caption_files import CaptionFinder
from .captions import CaptionRules
from .decoding import EXTENSIONS
from .findings import Finding
from .folders import FindingCollector, ListedImage, extension_of, list_folders
from .mask_files import find_masks
from .tables import TableRows

Role = Literal["train", "regularisation", "validation"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """An image file with its captions and its part in training."""

    file: Path
    name: str
    """Its path within the folder of its set, with ``/``."""
    set_number: int
    """Which of the data section's resolved ``sets`` it belongs to, from 0."""
    captions: tuple[str, ...]
    """Alternatives as they were found, less surrounding white space; () where there is none."""
    caption_file: Path | None
    """Where they stand; a table of metadata may hold those of many images."""
    rules: CaptionRules
    mask: Path | None
    role: Role
    repeats: int
    loss_weight: float
    """Of its set, times its own."""
    resolution: tuple[int, ...]
    """Sides in pixels of the squares whose areas it is shown at; () for the base's own."""
    crop: Literal["center", "random", "salient"]
    flip: bool

    def shown_at(self, resolution: int) -> bool:
        return not self.resolution or resolution in self.resolution


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Every image, sets in the order of the configuration and files by their names, and what is wrong with them."""

    sources: tuple[Source, ...]
    findings: tuple[Finding, ...]


def caption_rules(section: SetSection, data: DataSection) -> CaptionRules:
    """The rules of the captions of a complete set."""
    trigger = section.trigger
    if trigger is None:
        trigger = "" if section.role == "regularisation" else data.trigger or ""
    return CaptionRules(
        trigger=trigger,
        trigger_as=data.trigger_as,
        template=data.caption_template,
        prefix=section.caption_prefix,
        suffix=section.caption_suffix,
        replace=data.caption_replace,
        wildcards=section.wildcards,
        shuffle_tags=section.shuffle_tags,
        keep_tokens=section.keep_tokens,
        tag_dropout=section.tag_dropout,
    )


def find_sources(data: DataSection) -> Listing:
    """List every set of ``data``; a fault of the files is not raised, all of them are findings.

    Raises:
        ConfigError: ``data.dataset_config`` is at fault.
    """
    data = resolve_data(data)
    sources: list[Source] = []
    report = FindingCollector()
    for number, one in enumerate(data.sets):
        sources += _sources_of(number, one, data, report)
    findings = [*report.findings, *_shared_images(sources)]
    if sources and data.mask == "files" and not any(source.mask for source in sources):
        findings.append(
            Finding(
                code="mask-missing",
                severity="error",
                file=None,
                message=f'data.mask is "files", but none of the {len(sources)} images has a mask',
                remedy='put masks into a folder "mask" beside the images, under their names, or set data.mask = "none"',
            )
        )
    return Listing(sources=tuple(sources), findings=tuple(findings))


def _sources_of(number: int, one: SetSection, data: DataSection, report: FindingCollector) -> list[Source]:
    root = Path(one.images)
    if not root.is_dir():
        message = "not a folder" if root.exists() else "no such folder"
        report.tell("folder-missing", root, message, "name the folder of training images")
        return []
    folders = list_folders(root, subfolders=one.subfolders, report=report)
    rows = TableRows(folders, report)
    if one.metadata is None:
        rows.read_own()
        images = [image for folder in folders for image in folder.images]
    else:
        images = rows.read_named(Path(one.metadata), root)
    if not images:
        entries = sum(len(folder.files) for folder in folders)
        message = f"no image among its {entries} files"
        kinds = " ".join(sorted(EXTENSIONS))
        report.tell("folder-empty", root, message, f"put images there whose names end in {kinds}")
    _tell_collisions(images, rows, report)
    masks = Path(one.masks) if one.masks is not None else None
    mask_of = find_masks(folders, images, masks=masks, kind=data.mask, report=report)
    captions = CaptionFinder(one, data, report)
    rules = caption_rules(one, data)
    sources = []
    for image in sorted(images, key=lambda image: image.name):
        table, row = rows.of(image)
        caption = captions.caption(image, table, row)
        sources.append(
            Source(
                file=image.path,
                name=image.name,
                set_number=number,
                captions=caption.texts,
                caption_file=caption.file,
                rules=rules,
                mask=mask_of.get(image.path),
                role=one.role,
                repeats=one.repeats * image.folder.repeats,
                loss_weight=one.loss_weight * (1.0 if row is None else row.weight),
                resolution=one.own_sides,
                crop=one.crop,
                flip=one.flip,
            )
        )
    captions.tell_missing()
    captions.tell_unused(folders)
    return sources


def _tell_collisions(images: Sequence[ListedImage], rows: TableRows, report: FindingCollector) -> None:
    """Find images that have one caption file between them."""
    by_stem: dict[tuple[Path, str], list[ListedImage]] = {}
    for image in images:
        _, row = rows.of(image)
        if row is None or extension_of(row.name) != extension_of(image.file_name):
            by_stem.setdefault((image.folder.path, image.stem), []).append(image)
    for first, *others in by_stem.values():
        if others:
            message = f"shares its caption file with {', '.join(other.file_name for other in others)}"
            report.tell("stem-collision", first.path, message, "rename or remove one")


def _shared_images(sources: Sequence[Source]) -> Iterator[Finding]:
    """A finding for each image that more than one set has."""
    by_file: dict[str, list[Source]] = {}
    for source in sources:
        by_file.setdefault(os.path.realpath(source.file), []).append(source)
    for several in by_file.values():
        sides = [side for source in several for side in source.resolution or (0,)]
        if len(set(sides)) < len(sides) or len({source.role for source in several}) > 1:
            roles = sorted({source.role for source in several})
            learned = len(roles) > 1
            yield Finding(
                code="image-shared",
                severity="error" if learned else "warning",
                file=printable(several[0].file),
                message=f"in {len(several)} sets" + (f", with the roles {' and '.join(roles)}" if learned else ""),
                remedy="leave it in one of them"
                if learned
                else "leave it in one of them, or let repeats show it more often",
            )
