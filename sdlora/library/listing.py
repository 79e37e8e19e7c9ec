"""The public function ``list_loras``: the LoRAs in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import LoraFileError
from ..progress import Progress, Stop, progress_or_bar, raise_if_stopped
from .entry import BrokenFile, LoraEntry, LoraLibrary
from .equal import equal_files, hash_files, is_listed
from .facts import TableFacts
from .fitting import with_fits
from .header import HeaderReader, names_of
from .index import Index, IndexedFile, with_index
from .scan import FoundFile, found_files

_AT_ONCE = 500
"""Files after which what was read is kept, so that an interruption loses no more."""


def list_loras(
    folder: str | Path,
    *,
    search: str | None = None,
    base: str | None = None,
    duplicates: bool = False,
    hashes: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> LoraLibrary:
    """The LoRAs in ``folder`` and the folders in it, from the headers of ``.safetensors`` files alone.

    What was read is kept in an index in the user's cache folder and used again while size and modification time of a file
    are unchanged. Pickles (``.pt``, ``.ckpt``) are not listed, since they have no header.

    Args:
        search: words, all of which occur in the name, title, trigger, tags or base of what is listed; capital letters do
            not count.
        base: a base as ``generate`` takes it; each entry then says whether it fits.
        duplicates: also find files with equal tensors. Files that may be equal are read whole, the first time.
        hashes: also compute the hashes of each file that is listed, which reads it whole, the first time.
        progress: a bar on standard error by default.
        stop: ends the work; what was read until then is kept.

    Raises:
        LoraFileError: there is no such folder. Damaged files are among the result's ``broken``.
        BaseModelError: ``base`` cannot be used.
        Interrupted: ``stop`` was set.
    """
    place, words = Path(folder), tuple((search or "").casefold().split())
    found = {file.path: file for file in found_files(place)}
    with progress_or_bar(progress) as reports:

        def work(index: Index) -> LoraLibrary:
            _update(index, place, found, reports, stop)
            groups = equal_files(index, place, found, reports, stop) if duplicates else ()
            if hashes:
                layouts = index.layouts()
                listed = [file for file in index.files(place, words) if file.path in found]
                hash_files(index, [file for file in listed if is_listed(file, layouts)], reports, stop)
            library = _listed(index, place, found, words)
            shown = {entry.file for entry in library.loras}
            return replace(library, duplicates=tuple(group for group in groups if shown.intersection(group)))

        library = with_index(work)
        return library if base is None else with_fits(library, base)


def _listed(index: Index, folder: Path, found: Mapping[str, FoundFile], words: Sequence[str]) -> LoraLibrary:
    layouts = index.layouts()
    loras, broken, others = [], [], 0
    for known in index.files(folder, words):
        file = found.get(known.path)
        if file is None:
            continue
        layout = layouts.get(known.layout or "")
        if known.problem is not None or layout is None or known.facts is None:
            broken.append(BrokenFile(file=file.file, problem=known.problem or "it cannot be read"))
        elif layout.is_lora:
            loras.append(_entry(file, known, layout))
        else:
            others += 1
    return LoraLibrary(
        folder=str(folder),
        loras=tuple(sorted(loras, key=lambda entry: entry.file)),
        broken=tuple(sorted(broken, key=lambda entry: entry.file)),
        others=others,
    )


def _update(index: Index, folder: Path, found: Mapping[str, FoundFile], progress: Progress, stop: Stop | None) -> None:
    """Read the headers of what is new or has changed, and forget what has gone."""
    stamps = index.stamps(folder)
    new = [file for file in found.values() if stamps.get(file.path) != file.stamp]
    gone = stamps.keys() - found.keys()
    if gone:
        index.remove(gone)
    if not new:
        return
    reader = HeaderReader(index.layouts())
    progress.start("Reading headers", len(new))
    for start in range(0, len(new), _AT_ONCE):
        raise_if_stopped(stop, "stopped while reading headers; what was read is kept")
        some, before = new[start : start + _AT_ONCE], set(reader.tables)
        read = [_read(reader, file) for file in some]
        index.write(read, {digest: facts for digest, facts in reader.tables.items() if digest not in before})
        progress.advance(len(some))


def _read(reader: HeaderReader, file: FoundFile) -> IndexedFile:
    try:
        layout, facts, words = reader.read(file)
    except LoraFileError as error:
        problem = str(error).removeprefix(f"{file.path}: ").replace("\n", " ")
        words = "\n".join(names_of(Path(file.path))).casefold()
        return IndexedFile(path=file.path, stamp=file.stamp, layout=None, facts=None, problem=problem, words=words)
    return IndexedFile(path=file.path, stamp=file.stamp, layout=layout, facts=facts, problem=None, words=words)


def _entry(file: FoundFile, known: IndexedFile, layout: TableFacts) -> LoraEntry:
    facts = known.facts
    assert facts is not None
    hashed = known.payload_sha256 is not None
    return LoraEntry(
        file=file.file,
        name=file.name,
        alias=facts.alias if facts.alias != file.name else None,
        title=facts.title,
        family=layout.family or facts.family,
        made_for=facts.made_for,
        layout=known.layout or "",
        format=layout.format,
        kinds=layout.kinds,
        modules=layout.modules,
        ranks=layout.ranks,
        dtype=layout.dtype,
        bytes=file.size,
        modified=file.modified_ns / 1e9,
        trigger=facts.trigger,
        preview=file.preview,
        autov2=known.sha256[:10] if known.sha256 else None,
        autov3=known.payload_sha256[:12] if known.payload_sha256 else facts.stated_autov3,
        hashed=hashed,
    )
