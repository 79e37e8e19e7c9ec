"""A folder of pictures and captions -> checked records. Every fault is found, and all are reported at once."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .captions import read_caption, with_trigger
from .images import EXTENSIONS, open_picture
from .sources import Source


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture that has been decoded once; ``width`` and ``height`` are upright."""

    source: Source
    width: int
    height: int
    digest: str
    """SHA-256 over its pixels, composited on the background, and over its mask."""
    has_alpha: bool


def scan(folder: Path, *, trigger: str, caption_extension: str, background: str) -> list[Item]:
    """Pair, decode and check every picture in ``folder``; sorted by file name.

    Raises:
        DataError: with one line for each fault.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; data.images names the folder of training pictures")
    extension = "." + caption_extension.lstrip(".")
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in EXTENSIONS)
    if not files:
        others = sum(1 for _ in folder.iterdir())
        kinds = " ".join(sorted(EXTENSIONS))
        raise DataError(f"{folder}: no picture among its {others} entries; expected files ending in {kinds}")
    problems = _colliding_stems(files)

    def examine(file: Path) -> Item | DataError:
        faults: list[str] = []
        caption = size = digest = None
        try:
            caption = read_caption(_caption_file(file, extension))
        except DataError as error:
            faults += error.problems
        try:
            picture = open_picture(file, background)
            size, digest = picture.size, hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
        except DataError as error:
            faults += error.problems
        if caption is None or size is None or digest is None:
            return DataError(faults)
        return Item(file=file, caption=with_trigger(caption, trigger), width=size[0], height=size[1], digest=digest)

    with ThreadPoolExecutor() as pool:
        examined = list(pool.map(examine, files))
    problems += [problem for entry in examined if isinstance(entry, DataError) for problem in entry.problems]
    if problems:
        raise DataError(problems)
    return [entry for entry in examined if isinstance(entry, Item)]


def dataset_digest(items: list[Item]) -> str:
    """Over every picture's pixels and every caption, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.file.name}\0{item.digest}\0{item.caption}\0".encode())
    return digest.hexdigest()


def _colliding_stems(files: list[Path]) -> list[str]:
    by_stem: dict[str, list[str]] = {}
    for file in files:
        by_stem.setdefault(file.stem, []).append(file.name)
    return [
        f"{files[0].parent / names[0]}: shares its caption file with {', '.join(names[1:])}; rename or remove one"
        for names in by_stem.values()
        if len(names) > 1
    ]


def _caption_file(picture: Path, extension: str) -> Path:
    file = picture.with_suffix(extension)
    if file.is_file():
        return file
    beside = sorted(
        other.name
        for other in picture.parent.glob("*")
        if other.stem == picture.stem and other.suffix.lower() in {".txt", ".caption", ".json"}
    )
    hint = f"found {beside[0]}; set data.caption_extension" if beside else f"write {file.name} beside it"
    raise DataError(f"{picture}: no caption; {hint}")
