"""Captions of a set's images from files beside them or from tables, and reports of what is missing or left over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.sections import DataSection, SetSection
from .decoding import EXTENSIONS
from .findings import FindingCollector, Severity
from .folders import Folder, ListedImage, extension_of, stem_of
from .tables import Row, is_table

CAPTION_EXTENSIONS = (".txt", ".caption", ".cap", ".tags", ".json")
"""Extensions of caption files, of this trainer and others."""
UNREAD_EXTENSIONS = frozenset(
    {
        *(".psd", ".xcf", ".kra", ".svg", ".tga", ".exr", ".hdr", ".dds", ".jp2"),
        *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".mp4", ".webm", ".mov", ".mkv", ".avi"),
    }
)
"""Images and videos that may look like training material, but are not in ``EXTENSIONS``."""
NO_CAPTIONS = frozenset({"readme", "license", "licence", "copying", "notice", "credits"})
"""Names of text files that belong to no image."""
MAX_CAPTION_BYTES = 1 << 16
MAX_WORDS = 225
"""Three chunks of 75 tokens, the most of a caption that is read; a word is at least one token."""


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Captions that were found for an image."""

    texts: tuple[str, ...]
    """Alternatives; () where there is none."""
    file: Path | None
    """None for a class prompt, too."""


class CaptionFinder:
    """Finds the captions of one set's images; afterwards reports what is missing and unused."""

    def __init__(self, section: SetSection, data: DataSection, report: FindingCollector):
        self._root = Path(section.images)
        self._class_prompt = section.class_prompt
        self._extension = "." + section.caption_extension.lstrip(".").lower()
        self._lines = section.caption_lines
        self._missing_is: Severity = "warning" if data.allow_missing_captions else "error"
        self._report = report
        self._found: dict[Path, Caption] = {}
        self._missing: list[ListedImage] = []
        self._claimed: set[Path] = set()
        """Files that are an image's caption, or that already have a finding."""

    def caption(self, image: ListedImage, table: Path | None, row: Row | None) -> Caption:
        """The caption of ``image``: from its ``row`` of ``table``, else from its caption file, else the class prompt."""
        names = [name for name in image.folder.by_stem.get(image.stem, ()) if extension_of(name) == self._extension]
        file = image.folder.path / names[0] if names else None
        if file is not None:
            self._claimed.add(file)
        if table is not None and row is not None and (row.caption or row.tags):
            caption = Caption(texts=self._alternatives(row.caption or "", row.tags, image.path), file=table)
            if file is not None:
                message = f"a caption here and one in {table.name}; the table's is used"
                self._report.add("caption-twice", file, message, "remove one of them", "warning")
            self._check_length(caption.texts, image.path)
        elif file is not None:
            caption = Caption(texts=self._read(file), file=file)
        else:
            prompt = image.folder.class_prompt if self._class_prompt is None else self._class_prompt
            caption = Caption(texts=(prompt,) if prompt else (), file=None)
            self._missing.append(image)
        self._found[image.path] = caption
        return caption

    def _read(self, file: Path) -> tuple[str, ...]:
        try:
            with file.open("rb") as stream:
                stored = stream.read(MAX_CAPTION_BYTES + 1)
            text = stored[:MAX_CAPTION_BYTES].decode("utf-8-sig")
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            self._report.add("caption-unreadable", file, message, "make it readable")
            return ()
        except UnicodeDecodeError as error:
            message = f"not UTF-8 text (byte {error.start})"
            self._report.add("caption-not-utf8", file, message, "save it again as UTF-8")
            return ()
        if len(stored) > MAX_CAPTION_BYTES:
            message = f"more than {MAX_CAPTION_BYTES:,} bytes, too many for a caption"
            self._report.add("caption-too-long", file, message, "shorten it")
            return ()
        texts = self._alternatives(text, "", file)
        if not texts:
            self._report.add("caption-empty", file, "empty", "write what the image shows", self._missing_is)
        self._check_length(texts, file)
        return texts

    def _alternatives(self, text: str, tags: str, file: Path) -> tuple[str, ...]:
        lines = [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]
        if self._lines == "join":
            lines = [" ".join(lines)] if lines else []
        elif self._lines == "first" and len(lines) > 1:
            message = f"{len(lines)} lines; only the first is read"
            remedy = 'set data.caption_lines = "draw" to draw one in each epoch, or "join" to join them'
            self._report.add("caption-lines", file, message, remedy, "warning")
            lines = lines[:1]
        if tags:
            lines = [f"{line}, {tags}" for line in lines] or [tags]
        return tuple(dict.fromkeys(lines))

    def _check_length(self, texts: Sequence[str], file: Path) -> None:
        words = max((len(text.split()) for text in texts), default=0)
        if words > MAX_WORDS:
            message = f"a caption of {words} words; at most {MAX_WORDS} tokens are read"
            drawn = ', or set data.caption_lines = "draw" where each line is a caption'
            self._report.add("caption-too-long", file, message, "shorten it" + drawn * (self._lines == "join"))

    def report_missing(self) -> None:
        """Add findings for images without a caption, naming the files that were meant to be one."""
        captioned = sum(caption.file is not None for caption in self._found.values())
        elsewhere: dict[str, list[tuple[ListedImage, str]]] = {}
        alone: list[ListedImage] = []
        for image in self._missing:
            if beside := self._beside(image):
                elsewhere.setdefault(extension_of(beside), []).append((image, beside))
                self._claimed.add(image.folder.path / beside)
            else:
                alone.append(image)
        for extension, images in elsewhere.items():
            self._report_elsewhere(extension, images, general=len(images) > max(1, captioned))
        captioned_folders = {path.parent for path, caption in self._found.items() if caption.file is not None}
        bare = [image for image in alone if not self._found[image.path].texts]
        if len(bare) == len(self._found) > 1:
            message = f"none of its {len(bare)} images has a caption"
            remedy = f"write {bare[0].stem}{self._extension} and so on, or set data.allow_missing_captions = true"
            self._report.add("caption-missing", self._root, message, remedy, self._missing_is)
            return
        for image in alone:
            near, wanted = self._misnamed(image), image.stem + self._extension
            remedy = f"rename {near} as {wanted}" if near else f"write {wanted} beside it"
            if not self._found[image.path].texts:
                self._report.add("caption-missing", image.path, "no caption", remedy, self._missing_is)
            elif near or image.folder.path in captioned_folders:
                message = f"no caption, so it is trained on {self._found[image.path].texts[0]!r}"
                self._report.add("caption-missing", image.path, message, remedy, "warning")

    def _report_elsewhere(self, extension: str, images: Sequence[tuple[ListedImage, str]], *, general: bool) -> None:
        if general:
            message = f"found {len(images)} {extension} files; {self._extension} is expected"
            remedy = f'set data.caption_extension = "{extension}"'
            self._report.add("caption-extension", self._root, message, remedy, self._missing_is)
            return
        for image, beside in images:
            remedy = f"set data.caption_extension, or rename it {image.stem}{self._extension}"
            message = f"no caption, but found {beside}"
            self._report.add("caption-extension", image.path, message, remedy, self._missing_is)

    def _beside(self, image: ListedImage) -> str | None:
        """A caption file of ``image`` with another extension than expected."""
        for name in image.folder.by_stem.get(image.stem, ()):
            if extension_of(name) in CAPTION_EXTENSIONS and not is_table(name):
                return name
        return None

    def _misnamed(self, image: ListedImage) -> str | None:
        """A file that is probably the caption of ``image``: "1.png.txt", or with other capitals."""
        for stem in (stem_of(image.file_name + self._extension), image.stem):
            for name in image.folder.by_small_letters.get(stem.lower() + self._extension, ()):
                file = image.folder.path / name
                if file not in self._claimed:
                    self._claimed.add(file)
                    return name
        return None

    def report_unused(self, folders: Sequence[Folder]) -> None:
        """Add findings for captions without an image, and images in formats that are not read."""
        extra: dict[str, int] = {}
        for folder in folders:
            for name in folder.files:
                file, stem, extension = folder.path / name, stem_of(name), extension_of(name)
                beside = {extension_of(other) for other in folder.by_stem[stem]}
                if extension in UNREAD_EXTENSIONS:
                    message = f"{extension} files cannot be read, so this is not used"
                    self._report.add("image-format", file, message, "save it as PNG, or move it away", "warning")
                elif file in self._claimed or is_table(name):
                    continue
                elif beside & EXTENSIONS and extension in CAPTION_EXTENSIONS:
                    extra[extension] = extra.get(extension, 0) + 1
                elif extension == self._extension and not (beside & UNREAD_EXTENSIONS or stem.lower() in NO_CAPTIONS):
                    message, remedy = f"a caption without an image {stem}", "rename or remove it"
                    self._report.add("caption-unused", file, message, remedy, "warning")
        for extension, count in extra.items():
            message = f"{count} {extension} files are not read; captions come from other files"
            remedy = f'set data.caption_extension = "{extension}" if they are the captions you want'
            self._report.add("caption-extra", self._root, message, remedy, "note")
