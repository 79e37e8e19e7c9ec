"""Sources -> examined images: each file is decoded once, in threads, and only facts are kept unless asked otherwise."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..config.sections import MaskKind
from ..progress import Progress
from .decoding import ImageError
from .findings import Finding
from .image_facts import ImageFacts, examine_image
from .images import open_mask
from .kept_images import KeptImages
from .sources import Source

Key = TypeVar("Key")
Value = TypeVar("Value")

_AHEAD = 64
"""Files that are started before the first of them is finished; the rest can still be interrupted."""


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """What is known of the weights of an image's loss."""

    digest: str
    """SHA-256 of whatever determines the weights."""
    empty: bool
    """Whether every weight is 0."""


@dataclass(frozen=True, kw_only=True)
class ExaminedImage:
    """A listed image that was decoded once."""

    source: Source
    facts: ImageFacts
    mask: MaskFacts | None
    """None where all pixels count the same, and where the mask cannot be used."""

    @property
    def width(self) -> int:
        """In pixels, upright."""
        return self.facts.width

    @property
    def height(self) -> int:
        """In pixels, upright."""
        return self.facts.height

    def shown_digest(self, background: str) -> str:
        """The same for images that look the same on ``background``, ``#rrggbb``."""
        return f"{self.facts.digest} on {background}" if self.facts.alpha == "used" else self.facts.digest


def examine_images(
    sources: Sequence[Source], *, mask: MaskKind, kept: KeptImages, progress: Progress
) -> tuple[tuple[ExaminedImage, ...], tuple[Finding, ...]]:
    """Decode every image and every mask file of ``sources`` once.

    Returns the images in the order of the sources, without those that cannot be decoded, and a finding for each image
    or mask that cannot be used. ``kept`` is offered every image that is decoded in full.
    """
    files = list(dict.fromkeys(source.file for source in sources))
    facts, findings = _in_threads(partial(examine_image, kept=kept), files, progress, task="Examining images")
    readable = [source for source in sources if source.file in facts]
    masks: dict[_Masked, MaskFacts | None] = {}
    if mask == "alpha":
        masks = {(source.file, None): _alpha_mask(facts[source.file]) for source in readable}
    elif mask == "files":
        masked: list[_Masked] = [(source.file, source.mask) for source in readable if source.mask is not None]
        found, faults = _in_threads(
            partial(_mask_file, facts), list(dict.fromkeys(masked)), progress, task="Examining masks"
        )
        masks |= found
        findings += faults
    images = [
        ExaminedImage(source=source, facts=facts[source.file], mask=masks.get((source.file, source.mask)))
        for source in readable
    ]
    return tuple(images), tuple(findings)


_Masked = tuple[Path, Path | None]
"""The file of an image and that of its mask."""


def _mask_file(facts: Mapping[Path, ImageFacts], masked: _Masked) -> MaskFacts:
    file, mask = masked
    weights = open_mask(file, mask, (facts[file].width, facts[file].height), "files")
    assert weights is not None
    return MaskFacts(digest=hashlib.sha256(weights.tobytes()).hexdigest(), empty=not weights.any())


def _alpha_mask(facts: ImageFacts) -> MaskFacts | None:
    # The digest of an image whose alpha channel is used covers that channel.
    return MaskFacts(digest=facts.digest, empty=facts.transparent == 1) if facts.alpha == "used" else None


def _in_threads(
    work: Callable[[Key], Value], keys: Sequence[Key], progress: Progress, *, task: str
) -> tuple[dict[Key, Value], list[Finding]]:
    """What ``work`` returns for each of ``keys``, and the finding of each ``ImageError`` that it raises."""

    def attempt(key: Key) -> Value | Finding:
        try:
            return work(key)
        except ImageError as error:
            return error.finding

    done: dict[Key, Value] = {}
    findings: list[Finding] = []
    if not keys:
        return done, findings
    progress.start(task, len(keys))
    # One thread for each core: more would hold more images in memory and be no faster.
    # Pillow warns about what it can read; what matters of that is found in other ways.
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in range(0, len(keys), _AHEAD):
            started = keys[start : start + _AHEAD]
            for key, result in zip(started, pool.map(attempt, started), strict=True):
                if isinstance(result, Finding):
                    findings.append(result)
                else:
                    done[key] = result
                progress.advance()
    return done, findings


def dataset_digest(images: Sequence[ExaminedImage]) -> str:
    """SHA-256 of everything about ``images``, in order, that affects training: pixels, masks, captions, rules, roles.

    Of paths, only those within the folders of the sets are covered.
    """
    digest = hashlib.sha256()
    for image in images:
        source = dataclasses.asdict(image.source)
        for key in ("file", "caption_file", "mask"):
            del source[key]
        mask = None if image.mask is None else image.mask.digest
        covered = [image.facts.digest, mask, image.width, image.height, source]
        digest.update(json.dumps(covered, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
