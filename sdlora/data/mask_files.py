"""Mask files, and the images that they belong to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..config.sections import MaskKind
from .decoding import EXTENSIONS
from .findings import FindingCollector
from .folders import MASK_LABEL, Folder, ListedImage, extension_of, stem_of


def find_masks(
    folders: Sequence[Folder],
    images: Sequence[ListedImage],
    *,
    masks: Path | None,
    kind: MaskKind,
    report: FindingCollector,
) -> dict[Path, Path]:
    """File of an image -> file of its mask; empty where ``kind``, which is ``data.mask``, is not "files".

    The mask of NAME.png has the stem NAME, in ``masks`` or in a folder ``mask`` beside the image, or it is
    NAME-masklabel.png beside the image.
    """
    named = _by_stem(masks, report) if masks is not None else {}
    chosen: dict[Path, Path] = {}
    offered: dict[Path, list[Path]] = {}
    for folder in folders:
        within = _by_stem(folder.path / "mask", report) if (folder.path / "mask").is_dir() else {}
        labels = {stem_of(n).removesuffix(MASK_LABEL): folder.path / n for n in folder.files if folder.is_mask_label(n)}
        offered[folder.path] = [*within.values(), *labels.values()]
        for image in folder.images:
            mask = named.get(image.stem) or within.get(image.stem) or labels.get(image.stem)
            if mask is not None:
                chosen[image.path] = mask
    if kind != "files":
        for folder_path, files in offered.items():
            if files:
                message = f'{len(files)} masks are not used: data.mask is "{kind}"'
                report.add("mask-unused", folder_path, message, 'set data.mask = "files", or remove them', "warning")
        return {}
    used = set(chosen.values())
    for mask in [*named.values(), *(mask for files in offered.values() for mask in files)]:
        if mask not in used:
            report.add(
                "mask-unused", mask, "a mask without an image of the same name", "rename or remove it", "warning"
            )
    for image in images if chosen else ():
        if image.path not in chosen:
            message, remedy = "no mask, so all of it counts", f"add mask/{image.stem}.png"
            report.add("mask-missing", image.path, message, remedy, "warning")
    return chosen


def _by_stem(folder: Path, report: FindingCollector) -> dict[str, Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        report.add(
            "folder-missing", folder, f"the folder of masks cannot be listed: {error.strerror}", "correct the path"
        )
        return {}
    return {
        stem_of(name): folder / name for name in names if extension_of(name) in EXTENSIONS and not name.startswith(".")
    }
