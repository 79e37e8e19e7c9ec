"""Small sets of images, and what is found in them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.config.sections import DataSection
from sdlora.data.findings import Finding
from sdlora.data.items import Item, load_items
from sdlora.data.sources import Listing, Source, find_sources

GREY = Image.new("RGB", (8, 8), "grey")


def listed(folder: Path | str, **settings: Any) -> Listing:
    return find_sources(DataSection(**{"images": str(folder), "trigger": "zorb", **settings}))


def found(folder: Path | str, **settings: Any) -> tuple[Source, ...]:
    """Of a folder without a fault."""
    listing = listed(folder, **settings)
    assert listing.findings == ()
    return listing.sources


def codes(listing: Listing) -> list[tuple[str, str, str]]:
    return sorted((one.code, one.severity, Path(one.file or "").name) for one in listing.findings)


def loaded(listing: Listing, **settings: Any) -> tuple[tuple[Item, ...], tuple[Finding, ...]]:
    return load_items(listing, **{"background": "#ffffff", "mask": "none", **settings})


def put(file: Path, content: str | bytes = "") -> Path:
    """An image where ``file`` is named as one and nothing is given, else the given content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix.lower() in (".png", ".jpg", ".webp") and not content:
        GREY.save(file)
    else:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def texts(sources: tuple[Source, ...]) -> dict[str, tuple[str, ...]]:
    return {source.name: source.captions for source in sources}


# Folders


def write_csv(file: Path, rows: list[list[str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def images_in(folder: Path, *names: str) -> Path:
    for name in names:
        put(folder / name)
    return folder
