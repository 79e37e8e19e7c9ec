"""Captions for the images of a folder that have none, written beside them; what is there is never changed."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config.sections import DataSection
from ..data.caption_files import CAPTION_EXTENSIONS
from ..data.captions import with_trigger
from ..data.findings import raise_errors
from ..data.folders import extension_of, stem_of
from ..data.images import open_image
from ..data.sources import Source, find_sources
from ..errors import CaptionerError, ConfigError, DataError, Interrupted, SdloraError
from ..files import printable
from ..progress import Progress
from .models import Captioner, first_line

_NO_PLACE = frozenset({"folder-missing", "folder-empty"})
_OTHER_CAPTIONS = frozenset(CAPTION_EXTENSIONS) - {".json"}
"""Files beside an image that are a caption; a .json may be anything."""


@dataclass(frozen=True, kw_only=True)
class CaptionReport:
    """What was done to a folder."""

    folder: str
    written: tuple[str, ...]
    """Caption files."""
    present: int
    """Images that had a caption before."""
    problems: tuple[str, ...]
    """A line for each image that still has none, with the reason."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def caption_folder(
    folder: Path, load: Callable[[], Captioner], *, trigger: str, extension: str, progress: Progress
) -> CaptionReport:
    """Caption every image in ``folder`` and below that has no caption in a file of ``extension`` or in a table.

    ``load`` is called where there is something to do. ``trigger`` is put in front of what lacks it; "" for none. Each
    caption appears whole or not at all, so that after any interruption the same call goes on.

    Raises:
        DataError: no such folder, or no image in it.
        ConfigError: ``extension`` is none.
        CaptionerError: what ``load`` raises, or the model fails on an image.
        Interrupted: by Ctrl-C.
    """
    if not re.fullmatch(r"\.?[A-Za-z0-9]+", extension):
        raise ConfigError(f"{extension!r} is not a file extension; expected one such as .txt")
    extension = "." + extension.lstrip(".")
    listing = find_sources(DataSection(images=str(folder), caption_extension=extension))
    raise_errors(finding for finding in listing.findings if finding.code in _NO_PLACE)
    problems = [str(finding) for finding in listing.findings if finding.code == "folder-unreadable"]
    wanted = _without_captions(listing.sources, extension, problems)
    written: list[str] = []
    progress.start("Captioning", len(wanted))
    captioner: Captioner | None = None
    try:
        for image, target in wanted.items():
            captioner = captioner or load()
            try:
                text = _caption_of(captioner, image)
                if _write_new(target, with_trigger(text, trigger) if trigger else text):
                    written.append(printable(target))
            except DataError as error:
                problems += error.problems
            progress.advance(note=target.name)
    except KeyboardInterrupt:
        done = f"{sum(target.exists() for target in wanted.values())} of {len(wanted)} captions are written"
        raise Interrupted(f"interrupted: {done}; the same command goes on") from None
    return CaptionReport(
        folder=str(folder),
        written=tuple(written),
        present=sum(bool(source.captions) and source.caption_file is not None for source in listing.sources),
        problems=tuple(problems),
    )


def _without_captions(sources: Sequence[Source], extension: str, problems: list[str]) -> dict[Path, Path]:
    """Image -> the file that its caption goes to; ``problems`` gets a line for each that needs one and gets none."""
    wanted: dict[Path, Path] = {}
    owners: dict[Path, Path] = {}
    others = _other_captions({source.file.parent for source in sources})
    for source in sources:
        if source.caption_file is not None:
            if not source.captions:
                file = printable(source.caption_file)
                problems.append(f"{file}: holds no caption that can be read; remove it to have one written")
            continue
        target = source.file.with_name(os.path.splitext(source.file.name)[0] + extension)
        owner = owners.setdefault(target, source.file)
        if other := others.get((source.file.parent, stem_of(source.file.name))):
            remedy = f"give --caption-extension {extension_of(other)}, or rename it"
            problems.append(f"{printable(source.file)}: has a caption in {other} already; {remedy}")
        elif owner != source.file:
            problems.append(
                f"{printable(source.file)}: shares its caption file with {owner.name}; rename or remove one"
            )
        else:
            wanted[source.file] = target
    return wanted


def _other_captions(folders: Iterable[Path]) -> dict[tuple[Path, str], str]:
    """Folder and stem -> the caption file there, of whatever extension."""
    files = ((folder, name) for folder in folders for name in sorted(os.listdir(folder)))
    return {(folder, stem_of(name)): name for folder, name in files if extension_of(name) in _OTHER_CAPTIONS}


def _caption_of(captioner: Captioner, file: Path) -> str:
    image = open_image(file)
    try:
        text = " ".join(captioner.caption(image).split())
    except SdloraError:
        raise
    except Exception as error:  # Whatever a model's library raises.
        raise CaptionerError(f"{printable(file)}: the model fails on it: {first_line(error)}") from None
    if not text:
        raise DataError(f"{printable(file)}: the model has nothing to say of it; write its caption yourself")
    return text


def _write_new(file: Path, text: str) -> bool:
    """Write ``file`` whole; False where it exists by now, and is left as it is.

    Raises:
        DataError: it cannot be written.
    """
    partial = file.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        try:
            with partial.open("x", encoding="utf-8", newline="\n") as stream:
                stream.write(text + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(partial, file)  # Fails where the file exists, as a rename would not.
            except FileExistsError:
                return False
            except OSError:  # A file system without links.
                if file.exists():
                    return False
                os.rename(partial, file)
            return True
        finally:
            with suppress(OSError):
                partial.unlink()
    except OSError as error:
        raise DataError(f"{printable(file)}: cannot be written: {error.strerror or error}") from None
