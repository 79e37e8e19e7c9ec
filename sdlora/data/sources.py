"""The images of a dataset with their captions, before any is opened: folders, caption files, tables of metadata."""

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
from .findings import Finding, FindingCollector, findings_from
from .folders import ListedImage, extension_of, list_folders
from .mask_files import find_masks
from .tables import TableRows

Role = Literal["train", "regularisation", "validation"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """An image file with its captions and its role in training."""

    file: Path
    name: str
    """Its path within the folder of its set, with ``/``."""
    set_number: int
    """Index of its set in the resolved ``data.sets``."""
    captions: tuple[str, ...]
    """Alternatives as they were found, without surrounding white space; () where there is none."""
    caption_file: Path | None
    """File that holds them; a table of metadata may hold those of many images."""
    rules: CaptionRules
    mask: Path | None
    role: Role
    repeats: int
    loss_weight: float
    """Weight of its set times the weight of its row in a table."""
    resolution: tuple[int, ...]
    """Sides in pixels of the squares whose areas it is shown at; () for the resolution of the base."""
    crop: Literal["center", "random", "salient"]
    flip: bool

    def shown_at(self, resolution: int) -> bool:
        """Whether the image is shown at ``resolution``, in pixels."""
        return not self.resolution or resolution in self.resolution


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Every image, sets in the order of the configuration and files by name, and the findings of the listing."""

    sources: tuple[Source, ...]
    findings: tuple[Finding, ...]


def caption_rules(section: SetSection, data: DataSection) -> CaptionRules:
    """The caption rules of a complete set of ``data``."""
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
    """List every set of ``data``; faults of the files are findings.

    Raises:
        ConfigError: ``data.dataset_config`` cannot be used.
    """
    data = resolve_data(data)
    sources: list[Source] = []
    report = FindingCollector()
    for number, section in enumerate(data.sets):
        sources += _sources_of(number, section, data, report)
    unmasked = data.mask == "files" and not any(source.mask for source in sources)
    message = unmasked and sources and f'data.mask is "files", but none of the {len(sources)} images has a mask'
    remedy = 'put masks into a folder "mask" beside the images, under their names, or set data.mask = "none"'
    missing = findings_from(None, ("mask-missing", "error", message, remedy))
    return Listing(sources=tuple(sources), findings=(*report.findings, *_shared_images(sources), *missing))


def _sources_of(number: int, section: SetSection, data: DataSection, report: FindingCollector) -> list[Source]:
    root = Path(section.images)
    if not root.is_dir():
        message = "not a folder" if root.exists() else "no such folder"
        report.add("folder-missing", root, message, "name the folder of training images")
        return []
    folders = list_folders(root, subfolders=section.subfolders, report=report)
    rows = TableRows(folders, report)
    if section.metadata is None:
        rows.read_in_folders()
        images = [image for folder in folders for image in folder.images]
    else:
        images = rows.read_named(Path(section.metadata), root)
    if not images:
        entries = sum(len(folder.files) for folder in folders)
        message = f"no image among its {entries} files"
        kinds = " ".join(sorted(EXTENSIONS))
        report.add("folder-empty", root, message, f"add images whose names end in {kinds}")
    _report_collisions(images, rows, report)
    masks = Path(section.masks) if section.masks is not None else None
    mask_of = find_masks(folders, images, masks=masks, kind=data.mask, report=report)
    captions = CaptionFinder(section, data, report)
    rules = caption_rules(section, data)
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
                role=section.role,
                repeats=section.repeats * image.folder.repeats,
                loss_weight=section.loss_weight * (1.0 if row is None else row.weight),
                resolution=section.own_sides,
                crop=section.crop,
                flip=section.flip,
            )
        )
    captions.report_missing()
    captions.report_unused(folders)
    return sources


def _report_collisions(images: Sequence[ListedImage], rows: TableRows, report: FindingCollector) -> None:
    """Report images that share a caption file."""
    by_stem: dict[tuple[Path, str], list[ListedImage]] = {}
    for image in images:
        _, row = rows.of(image)
        if row is None or extension_of(row.name) != extension_of(image.file_name):
            by_stem.setdefault((image.folder.path, image.stem), []).append(image)
    for first, *others in by_stem.values():
        if others:
            message = f"shares its caption file with {', '.join(other.file_name for other in others)}"
            report.add("stem-collision", first.path, message, "rename or remove one")


def _shared_images(sources: Sequence[Source]) -> Iterator[Finding]:
    """A finding for each image that is in more than one set."""
    by_file: dict[str, list[Source]] = {}
    for source in sources:
        by_file.setdefault(os.path.realpath(source.file), []).append(source)
    for several in by_file.values():
        sides = [side for source in several for side in source.resolution or (0,)]
        if len(set(sides)) < len(sides) or len({source.role for source in several}) > 1:
            roles = sorted({source.role for source in several})
            same_role = len(roles) == 1
            in_sets = f"in {len(several)} sets"
            yield from findings_from(
                printable(several[0].file),
                (
                    "image-shared",
                    "error",
                    not same_role and f"{in_sets}, with the roles {' and '.join(roles)}",
                    "leave it in one of them",
                ),
                (
                    "image-shared",
                    "warning",
                    same_role and in_sets,
                    "leave it in one of them, or use repeats to show it more often",
                ),
            )
