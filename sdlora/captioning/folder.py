"""Write the missing captions of a folder beside its images. Existing captions are never changed."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.sections import DataSection
from ..data.caption_files import CAPTION_EXTENSIONS
from ..data.captions import with_trigger
from ..data.findings import raise_errors
from ..data.folders import extension_of, stem_of
from ..data.images import open_image
from ..data.sources import Listing, Source, find_sources
from ..errors import CaptionerError, ConfigError, DataError, Interrupted, SdloraError
from ..files import printable, write_new
from ..progress import Progress, progress_or_bar
from .models import Captioner, find_kind, first_line, open_captioner

if TYPE_CHECKING:
    from PIL import Image

_NOTHING_TO_CAPTION = frozenset({"folder-missing", "folder-empty"})
"""Codes of findings."""
_OTHER_CAPTIONS = frozenset(CAPTION_EXTENSIONS) - {".json"}
"""Extensions of files that are captions; a .json may be anything."""


@dataclass(frozen=True, kw_only=True)
class CaptionReport:
    """What was done in a folder."""

    folder: str
    written: tuple[str, ...]
    """Caption files."""
    present: int
    """Images that had a caption before."""
    problems: tuple[str, ...]
    """One line for each image that still has no caption, with the reason."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)


def caption_folder(
    folder: str | Path,
    *,
    model: str | Path,
    kind: str = "auto",
    trigger: str = "",
    extension: str = ".txt",
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> CaptionReport:
    """Caption every image in ``folder`` and its subfolders that has no caption, with the model in folder ``model``.

    ``kind`` is "blip", "florence", "wd14", or "auto" to detect it. ``trigger`` is put in front of captions that lack
    it. Captions are written to files of ``extension``, each whole or not at all; the same call resumes after an
    interruption. Without ``progress``, a bar is shown on a terminal. When ``stop`` is set, work ends after the images at
    hand: one, or on a GPU a few.

    Raises:
        DataError: ``folder`` does not exist or holds no image.
        ConfigError: ``extension`` is not a file extension.
        CaptionerError: the model is missing, damaged, of another kind, or fails on an image.
        Interrupted: by ``stop`` or Ctrl-C; the captions so far are written.
    """
    model = Path(model)
    found_kind = find_kind(model, kind)
    with progress_or_bar(progress) as reporter:
        return write_captions(
            Path(folder),
            lambda: open_captioner(model, found_kind),
            trigger=trigger,
            extension=extension,
            progress=reporter,
            stop=stop,
        )


def write_captions(
    folder: Path,
    load: Callable[[], Captioner],
    *,
    trigger: str,
    extension: str,
    progress: Progress,
    stop: threading.Event | None = None,
) -> CaptionReport:
    """As ``caption_folder``, with the model that ``load`` returns; it is called only if a caption is missing."""
    if not re.fullmatch(r"\.?[A-Za-z0-9]+", extension):
        raise ConfigError(f"{extension!r} is not a file extension; expected one such as .txt")
    extension = "." + extension.lstrip(".")
    listing = _list_images(folder, extension)
    raise_errors(finding for finding in listing.findings if finding.code in _NOTHING_TO_CAPTION)
    problems = [str(finding) for finding in listing.findings if finding.code == "folder-unreadable"]
    missing = _missing_captions(listing.sources, extension, problems)
    written: list[str] = []
    progress.start("Captioning", len(missing))
    captioner: Captioner | None = None
    waiting = list(missing)
    try:
        while waiting:
            if stop is not None and stop.is_set():
                raise _interruption(missing)
            captioner = captioner or load()
            images, waiting = waiting[: captioner.at_once], waiting[captioner.at_once :]
            for image, text in _captions_of(captioner, images):
                caption_file = missing[image]
                try:
                    if isinstance(text, DataError):
                        raise text
                    if _write_new(caption_file, with_trigger(text, trigger) if trigger else text):
                        written.append(printable(caption_file))
                except DataError as error:
                    problems += error.problems
                progress.advance(note=caption_file.name)
    except KeyboardInterrupt:
        raise _interruption(missing) from None
    return CaptionReport(
        folder=str(folder),
        written=tuple(written),
        present=sum(bool(source.captions) and source.caption_file is not None for source in listing.sources),
        problems=tuple(problems),
    )


def _interruption(missing: Mapping[Path, Path]) -> Interrupted:
    written = sum(caption_file.exists() for caption_file in missing.values())
    return Interrupted(f"interrupted: {written} of {len(missing)} captions are written; run the same command to resume")


def _list_images(folder: Path, extension: str) -> Listing:
    return find_sources(DataSection(images=str(folder), caption_extension=extension))


def _missing_captions(sources: Sequence[Source], extension: str, problems: list[str]) -> dict[Path, Path]:
    """Image -> the caption file to write; ``problems`` gets a line for each image that needs one and cannot get it."""
    missing: dict[Path, Path] = {}
    images: dict[Path, Path] = {}
    others = _other_captions({source.file.parent for source in sources})
    for source in sources:
        if source.caption_file is not None:
            if not source.captions:
                file = printable(source.caption_file)
                problems.append(f"{file}: holds no readable caption; remove it to have one written")
            continue
        caption_file = source.file.with_name(os.path.splitext(source.file.name)[0] + extension)
        first_image = images.setdefault(caption_file, source.file)
        if other := others.get((source.file.parent, stem_of(source.file.name))):
            remedy = f"pass --caption-extension {extension_of(other)}, or rename it"
            problems.append(f"{printable(source.file)}: already has a caption in {other}; {remedy}")
        elif first_image != source.file:
            problems.append(
                f"{printable(source.file)}: shares its caption file with {first_image.name}; rename or remove one"
            )
        else:
            missing[source.file] = caption_file
    return missing


def _other_captions(folders: Iterable[Path]) -> dict[tuple[Path, str], str]:
    """(folder, stem) -> name of the caption file there, whatever its extension."""
    files = ((folder, name) for folder in folders for name in sorted(os.listdir(folder)))
    return {(folder, stem_of(name)): name for folder, name in files if extension_of(name) in _OTHER_CAPTIONS}


def _captions_of(captioner: Captioner, files: Sequence[Path]) -> Iterator[tuple[Path, str | DataError]]:
    """The caption of each image, or why it has none, in their order."""
    opened: dict[Path, Image.Image | DataError] = {}
    for file in files:
        try:
            opened[file] = open_image(file)
        except DataError as error:
            opened[file] = error
    images = {file: image for file, image in opened.items() if not isinstance(image, DataError)}
    texts = _described(captioner, images)
    for file, image in opened.items():
        yield file, image if isinstance(image, DataError) else _checked(file, next(texts))


def _described(captioner: Captioner, images: Mapping[Path, Image.Image]) -> Iterator[str]:
    """What the model says of each. Where it fails on several at once, out of memory for example, each is tried alone."""
    try:
        yield from captioner.captions(list(images.values())) if images else ()
        return
    except SdloraError:
        raise
    except Exception as error:  # Whatever a model's library raises.
        if len(images) == 1:
            reason = f"the model failed on this image: {first_line(error)}"
            raise CaptionerError(f"{printable(next(iter(images)))}: {reason}") from None
    for file, image in images.items():
        yield from _described(captioner, {file: image})


def _checked(file: Path, text: str) -> str | DataError:
    joined = " ".join(text.split())
    return joined or DataError(f"{printable(file)}: the model returned no caption; write one yourself")


def _write_new(file: Path, text: str) -> bool:
    """Write ``file`` whole; False, and nothing changed, if it exists by now.

    Raises:
        DataError: it cannot be written.
    """
    try:
        return write_new(file, f"{text}\n".encode())
    except OSError as error:
        raise DataError(f"{printable(file)}: cannot be written: {error.strerror or error}") from None
