"""Which images there are and what is said of each, before any is opened: folders, caption files, tables of metadata."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.kohya_dataset import read_dataset_config
from ..config.sections import Config, DataSection, OutputSection, SetSection
from ..files import printable
from .caption_files import CaptionFinder
from .captions import CaptionRules
from .decoding import EXTENSIONS
from .findings import Finding, FindingCollector
from .folders import ListedImage, extension_of, list_folders
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


def resolve_config(config: Config) -> Config:
    """``config`` with every folder in ``data.sets``, and with what ``data.dataset_config`` says.

    The same again where that is so already. Every stage of a run reads its settings here, and so does its identity.

    Raises:
        ConfigError: ``data.dataset_config`` is at fault.
    """
    data, train = config.data, config.train
    if data.dataset_config is not None:
        data, train = read_dataset_config(data, train)
    if data.images is not None:
        only = SetSection(images=data.images, metadata=data.metadata)
        data = data.model_copy(update={"images": None, "metadata": None, "sets": (only,)})
    return config.model_copy(update={"data": data, "train": train})


def resolve_data(data: DataSection) -> DataSection:
    """The data section of ``resolve_config``."""
    return resolve_config(Config(data=data, output=OutputSection(path="_.safetensors"))).data


def caption_rules(one: SetSection, data: DataSection) -> CaptionRules:
    """The rules of the captions of a set."""

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
        report.add("folder-missing", root, message, "name the folder of training images")
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
        report.add("folder-empty", root, message, f"put images there whose names end in {kinds}")
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
                resolution=data.sides_of(one),
                crop=one.crop or data.crop,
                flip=data.flip if one.flip is None else one.flip,
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
            report.add("stem-collision", first.path, message, "rename or remove one")


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
