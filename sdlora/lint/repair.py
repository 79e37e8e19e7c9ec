"""A repaired copy of a dataset: only what can be repaired safely, and the dataset itself is only read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..config.sections import DataSection
from ..data.caption_files import CAPTION_EXTENSIONS
from ..data.captions import with_trigger
from ..data.decoding import SUFFIXES
from ..data.examine import ExaminedImage
from ..data.folders import stem_of
from ..data.images import write_upright
from ..data.sources import Source
from ..errors import DataError
from ..files import printable, whole_folder
from ..progress import Progress
from .duplicates import exact_groups


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A difference of the copy from the dataset."""

    code: str
    """Code of the finding that it repairs."""
    file: str
    """The image file in the dataset."""
    done: str
    """Begins with a verb: ``turned upright``."""


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """A finished copy."""

    folder: Path
    images: int
    """Number of images in the copy."""
    repairs: tuple[Repair, ...]

    def lines(self) -> list[str]:
        """One line for each kind of repair, with the image or the number of images."""
        files: dict[str, list[str]] = {}
        for repair in self.repairs:
            files.setdefault(repair.done, []).append(repair.file)
        return [
            f"  {repaired[0] if len(repaired) == 1 else f'{len(repaired)} images'}: {done}"
            for done, repaired in files.items()
        ]


def write_repaired(
    data: DataSection, sources: Sequence[Source], examined: Sequence[ExaminedImage], *, out: Path, progress: Progress
) -> RepairReport:
    """Write a copy of the images, their captions and masks to the new folder ``out``, and report the differences.

    Left out: what cannot be decoded, copies of an image that have the same caption, and files that nothing uses. Images
    are turned upright and named after their format; names that collide become different. Captions get one extension,
    UTF-8 encoding, and the trigger where they lack it. Everything else is copied byte for byte. Several sets become
    folders of ``out``.

    Args:
        data: resolved, as the sources number its sets.

    Raises:
        DataError: ``out`` is not new, lies within a set or contains one, or cannot be written; nothing is left of it then.
    """
    roots = [Path(section.images) for section in data.sets]
    _check_target(out, roots)
    folders = [PurePosixPath(name) for name in _folder_names(roots)]
    names = _Names()
    kept, repairs = _kept(sources, examined)
    progress.start("Writing the copy", len(kept))
    try:
        with whole_folder(out) as work:
            for image in kept:
                repairs += _copy(image, work, folders[image.source.set_number], names, data)
                progress.advance()
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    return RepairReport(folder=out, images=len(kept), repairs=tuple(repairs))


class _Names:
    """Gives each image a different stem, regardless of capitals and the encoding of accents."""

    def __init__(self):
        self._taken: set[str] = set()

    def free(self, path: PurePosixPath, old_suffix: str) -> PurePosixPath:
        """``path`` if its stem is free, otherwise with the old extension or a number added to the stem."""
        candidates = [path, path.with_stem(f"{path.stem}-{old_suffix.lstrip('.').lower()}")]
        number = 2
        while (key := str(candidates[0].with_name(stem_of(candidates[0].name))).casefold()) in self._taken:
            candidates.pop(0)
            if not candidates:
                candidates.append(path.with_stem(f"{path.stem}-{number}"))
                number += 1
        self._taken.add(key)
        return candidates[0]


def _check_target(out: Path, roots: Sequence[Path]) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise DataError(f"{out}: exists already; --out names a new folder for the copy")
    target = out.resolve()
    for root in roots:
        source = root.resolve()
        if source.is_relative_to(target) or target.is_relative_to(source):
            raise DataError(f"{out}: the copy cannot lie within {root} or contain it; name a folder beside it")


def _folder_names(roots: Sequence[Path]) -> list[str]:
    if len(roots) == 1:
        return [""]
    names = [root.resolve().name for root in roots]
    return [name if names.count(name) == 1 else f"{number}-{name}" for number, name in enumerate(names, 1)]


def _kept(sources: Sequence[Source], examined: Sequence[ExaminedImage]) -> tuple[list[ExaminedImage], list[Repair]]:
    """The images that go into the copy, and why the others do not."""
    readable = {image.source.file for image in examined}
    repairs = [
        Repair(code="image-unreadable", file=printable(source.file), done="left out, as it cannot be decoded")
        for source in sources
        if source.file not in readable
    ]
    surplus = set()
    for group in exact_groups([image.facts for image in examined]):
        seen: dict[tuple[object, ...], Source] = {}
        for number in group:
            source = examined[number].source
            first = seen.setdefault((source.set_number, source.captions, bool(source.mask)), source)
            if first is not source:
                surplus.add(number)
                done = f"left out, as it is the same image as {printable(first.file)}"
                repairs.append(Repair(code="image-duplicate", file=printable(source.file), done=done))
    return [image for number, image in enumerate(examined) if number not in surplus], repairs


def _copy(
    image: ExaminedImage, work: Path, folder: PurePosixPath, names: _Names, data: DataSection
) -> Iterator[Repair]:
    source, facts = image.source, image.facts

    def repair(code: str, done: str) -> Repair:
        return Repair(code=code, file=printable(source.file), done=done)

    old = folder / source.name
    named = old
    if old.suffix.lower() not in SUFFIXES[facts.format]:
        named = old.with_suffix(SUFFIXES[facts.format][0])
        yield repair("image-extension", f"named {named.name}, as it is a {facts.format} file")
    new = names.free(named, old.suffix)
    if new != named:
        yield repair("stem-collision", f"named {new.name}, so that its caption belongs to it alone")
    target = work / new
    target.parent.mkdir(parents=True, exist_ok=True)
    if facts.orientation != 1 and facts.frames == 1 and facts.bits == 8 and write_upright(source.file, target):
        yield repair("image-turned", "turned upright")
    else:
        shutil.copyfile(source.file, target)
    if source.mask is not None:
        (target.parent / "mask").mkdir(exist_ok=True)
        shutil.copyfile(source.mask, target.parent / "mask" / f"{target.stem}{source.mask.suffix}")
    extension = data.sets[source.set_number].caption_extension
    yield from _write_caption(source, target.with_suffix("." + extension.lstrip(".")))


def _write_caption(source: Source, target: Path) -> Iterator[Repair]:
    """Write the captions of ``source``, one on each line; nothing where there are none."""

    def repair(code: str, done: str) -> Repair:
        return Repair(code=code, file=printable(source.file), done=done)

    captions = source.captions if source.caption_file is not None else ()
    if not any(captions):
        found = _beside(source)
        lines = [] if found is None else _decoded(found.read_bytes()).splitlines()
        captions = tuple(" ".join(line.split()) for line in lines if line.strip())
        if found is None or not captions:
            if source.caption_file is not None:
                target.touch()
            return
        same = found.suffix.lower() == target.suffix.lower()
        yield repair(
            "caption-encoding" if same else "caption-extension",
            f"caption of {found.name} written " + ("as UTF-8" if same else f"to {target.name}"),
        )
    elif source.caption_file is not None and stem_of(source.caption_file.name) != stem_of(source.file.name):
        yield repair("caption-table", f"caption of {source.caption_file.name} written to {target.name}")
    trigger = source.rules.trigger
    if trigger and source.role == "train" and source.rules.trigger_as == "word":
        ensured = tuple(with_trigger(caption, trigger) for caption in captions)
        if ensured != captions:
            yield repair("trigger-absent", f"{trigger!r} put in front of its caption")
        captions = ensured
    target.write_bytes("".join(f"{caption}\n" for caption in captions).encode())


def _beside(source: Source) -> Path | None:
    """A caption file of any kind that was not used as its caption."""
    files = [source.caption_file] if source.caption_file is not None else []
    files += [source.file.with_suffix(extension) for extension in CAPTION_EXTENSIONS if extension != ".json"]
    return next((file for file in files if _has_text(file)), None)


def _has_text(file: Path) -> bool:
    return file.is_file() and os.access(file, os.R_OK) and file.stat().st_size > 0


def _decoded(data: bytes) -> str:
    """Text in UTF-8 or UTF-16 if it is valid, otherwise in Windows' western encoding."""
    for encoding in ("utf-8-sig", "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")
