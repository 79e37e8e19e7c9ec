"""Small sets of images, and what is found in them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.config.sections import DataSection, MaskKind
from sdlora.data.examine import ExaminedImage, examine_images
from sdlora.data.findings import Finding
from sdlora.data.kept_images import KeptImages
from sdlora.data.sources import Listing, Source, find_sources
from sdlora.progress import Progress, Silence

GREY = Image.new("RGB", (8, 8), "grey")


def listed(folder: Path | str, **settings: Any) -> Listing:
    return find_sources(DataSection(**{"images": str(folder), "trigger": "zorb", **settings}))


def found(folder: Path | str, **settings: Any) -> tuple[Source, ...]:
    """Sources of a folder without a fault."""
    listing = listed(folder, **settings)
    assert listing.findings == ()
    return listing.sources


def codes(listing: Listing) -> list[tuple[str, str, str]]:
    return sorted((finding.code, finding.severity, Path(finding.file or "").name) for finding in listing.findings)


def examined(
    listing: Listing, *, mask: MaskKind = "none", progress: Progress | None = None
) -> tuple[tuple[ExaminedImage, ...], tuple[Finding, ...]]:
    kept = KeptImages("#ffffff", limit=0)
    return examine_images(listing.sources, mask=mask, kept=kept, progress=progress or Silence())


def put(file: Path, content: str | bytes = "") -> Path:
    """Write ``content``, or an image where ``file`` has the name of one and no content is given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix.lower() in (".png", ".jpg", ".webp") and not content:
        GREY.save(file)
    else:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def texts(sources: tuple[Source, ...]) -> dict[str, tuple[str, ...]]:
    return {source.name: source.captions for source in sources}


def write_csv(file: Path, rows: list[list[str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def images_in(folder: Path, *names: str) -> Path:
    for name in names:
        put(folder / name)
    return folder
