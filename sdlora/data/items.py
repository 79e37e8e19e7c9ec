"""Sources -> checked records of images: each is decoded once, in parallel, and none is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..progress import Progress, Silence
from .decoding import ImageError
from .findings import Finding
from .images import open_image, open_mask
from .sources import Listing, Source

MaskKind = Literal["none", "alpha", "files"]

WORKERS = min(8, os.cpu_count() or 1)
"""Images that are decoded at once, and so in memory."""
STRIP = 256
"""Rows that are hashed at once."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image that has been decoded once; ``width`` and ``height`` are upright."""

    source: Source
    width: int
    height: int
    digest: str
    """SHA-256 over its pixels, composited on the background."""
    mask_digest: str | None
    """Over what weights its loss; None where nothing does."""


def load_items(
    listing: Listing, *, background: str, mask: MaskKind, progress: Progress | None = None
) -> tuple[tuple[Item, ...], tuple[Finding, ...]]:
    """Decode every image of ``listing`` once; ``background`` is what transparency is composited on, ``#rrggbb``.

    Items come in the order of the sources; an image that cannot be decoded has none, but a finding.
    """
    progress = progress or Silence()
    wanted = list(dict.fromkeys((source.file, source.mask) for source in listing.sources))
    progress.start("Reading images", len(wanted))
    decoded: dict[tuple[Path, Path | None], _Decoded] = {}
    findings: list[Finding] = []
    # What Pillow warns of is found otherwise, where it matters.
    with ThreadPoolExecutor(WORKERS) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for pair, result in zip(wanted, pool.map(lambda pair: _decode(*pair, background, mask), wanted), strict=True):
            if isinstance(result, Finding):
                findings.append(result)
            else:
                decoded[pair] = result
            progress.advance()
    items = [
        Item(source=source, **vars(found))
        for source in listing.sources
        if (found := decoded.get((source.file, source.mask))) is not None
    ]
    return tuple(items), tuple(findings)


def dataset_digest(items: Sequence[Item]) -> str:
    """SHA-256 over all that alters training on ``items``, in order: pixels, masks, captions, rules, roles, weights.

    No path goes into it but those within the folders of the sets.
    """
    digest = hashlib.sha256()
    for item in items:
        told = dataclasses.asdict(item.source)
        for key in ("file", "caption_file", "mask"):
            del told[key]
        shown = [item.digest, item.mask_digest, item.width, item.height, told]
        digest.update(json.dumps(shown, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    width: int
    height: int
    digest: str
    mask_digest: str | None


def _decode(file: Path, mask: Path | None, background: str, kind: MaskKind) -> _Decoded | Finding:
    try:
        image = open_image(file, background)
        weights = open_mask(file, mask, image.size, kind)
    except ImageError as error:
        return error.finding
    digest = hashlib.sha256(repr(image.size).encode())
    for top in range(0, image.height, STRIP):
        digest.update(image.crop((0, top, image.width, min(top + STRIP, image.height))).tobytes())
    return _Decoded(
        width=image.width,
        height=image.height,
        digest=digest.hexdigest(),
        mask_digest=None if weights is None else hashlib.sha256(weights.tobytes()).hexdigest(),
    )
