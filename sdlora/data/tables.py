"""Tables of captions: Hugging Face's imagefolder (``metadata.jsonl``, ``metadata.csv``) and kohya's ``meta_*.json``."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import printable
from .decoding import EXTENSIONS
from .findings import Finding, FindingCollector
from .folders import Folder, ListedImage, extension_of

NAME_KEYS = ("file_name", "image_path")
"""Keys of the image's file: the imagefolder's, and kohya's in .jsonl."""
CAPTION_KEYS = ("text", "caption", "prompt")
WEIGHT_KEYS = ("loss_weight", "weight")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image's entry in a table."""

    name: str
    """Path of the image file as written in the table, with ``/``; in kohya's .json it may lack the extension."""
    where: str
    """The line of the row, or its key."""
    caption: str | None
    tags: str
    """Comma-separated; added to each alternative of the caption."""
    weight: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows that could be read, and a finding for each of the others."""

    file: Path
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]


def is_table(name: str) -> bool:
    """Whether a file of this name in a folder of images is read as a table of their captions."""
    return re.fullmatch(r"metadata\.jsonl|metadata\.csv|meta_.+\.json", name) is not None


def read_table(file: Path) -> Table:
    """Read ``file`` by its extension: .jsonl, .csv, or .json; every fault is a finding."""
    reading = _Reading(file)
    readers = {".jsonl": reading.json_lines, ".csv": reading.csv_rows, ".json": reading.json_entries}
    reader, rows = readers.get(extension_of(file.name)), ()
    try:
        if reader is None:
            reading.fault(
                "table-unreadable", "a table in an unknown format", "name one that ends in .jsonl, .csv or .json"
            )
        else:
            rows = tuple(reader(file.read_bytes().decode("utf-8-sig")))
            if not (rows or reading.findings):
                reading.fault("table-empty", "no rows in this table", "write one for each image, or remove it")
    except OSError as error:
        reading.fault(
            "table-unreadable", f"this table cannot be read: {error.strerror}", "check the path and its permissions"
        )
    except UnicodeDecodeError as error:
        reading.fault("table-not-utf8", f"not UTF-8 text (byte {error.start})", "save it again as UTF-8")
    return Table(file=file, rows=rows, findings=tuple(reading.findings))


class TableRows:
    """The table and row of each image of a set; faults are added to ``report``."""

    def __init__(self, folders: Sequence[Folder], report: FindingCollector):
        self._folders, self._report = folders, report
        self._rows: dict[str, tuple[Path, Row]] = {}
        self._images = {_key(image.path): image for folder in folders for image in folder.images}
        self._by_stem: dict[str, list[ListedImage]] = {}
        for key, image in self._images.items():
            self._by_stem.setdefault(os.path.splitext(key)[0], []).append(image)

    def of(self, image: ListedImage) -> tuple[Path, Row] | tuple[None, None]:
        """The table and the row of ``image``; (None, None) if it is in no table."""
        return self._rows.get(_key(image.path), (None, None))

    def read_in_folders(self) -> None:
        """Read the table of each folder that has one."""
        for folder in self._folders:
            tables = [name for name in folder.files if is_table(name)]
            if len(tables) > 1:
                message = f"several tables of captions: {', '.join(tables)}"
                remedy = "name the right one in data.metadata or in metadata of the set, or keep only one"
                self._report.add("table-several", folder.path, message, remedy)
            for name in tables[:1]:
                self._read(folder.path / name, (folder.path,), others=False)

    def read_named(self, file: Path, root: Path) -> list[ListedImage]:
        """Read ``file``, whose paths are relative to ``root`` or to its own folder; returns the images that it names."""
        self._read(file, (root, file.parent), others=True)
        unused = [key for key in self._images if key not in self._rows]
        if unused and self._rows:
            message = (
                f"{len(unused)} of its {len(self._images)} images are not in {printable(file)}, so they are not used"
            )
            remedy = f"add rows, for example of {self._images[unused[0]].name}, or move them away"
            self._report.add("image-unused", root, message, remedy, "warning")
        return [self._images[key] for key in self._rows]

    def _read(self, file: Path, bases: Sequence[Path], *, others: bool) -> None:
        table = read_table(file)
        self._report.findings += table.findings
        for row in table.rows:
            found = (self._named(base / row.name, others=others) for base in bases)
            images = next(filter(None, found), ())
            if not images:
                message = f"{row.where} names {row.name!r}, which is not an image of this set"
                self._report.add("row-without-image", file, message, "correct the name, or remove the row")
            for key in dict.fromkeys(_key(image.path) for image in images):
                if key in self._rows:
                    message = f"{row.where} names {row.name!r} again, after {self._rows[key][1].where}"
                    self._report.add("row-duplicate", file, message, "keep one of them")
                else:
                    self._rows[key] = (file, row)

    def _named(self, path: Path, *, others: bool) -> Sequence[ListedImage]:
        """The images at ``path``, with or without their extension; with ``others``, also outside the set."""
        key = _key(path)
        if key not in self._images and others and extension_of(path.name) in EXTENSIONS and os.path.isfile(path):
            folder = Folder(path=path.parent, name="", files=(), repeats=1, class_prompt=None)
            self._images[key] = ListedImage(folder=folder, file_name=path.name)
        return [self._images[key]] if key in self._images else self._by_stem.get(key, ())


def _key(path: Path) -> str:
    return unicodedata.normalize("NFC", os.path.abspath(path))


class _Reading:
    """One table being read."""

    def __init__(self, file: Path):
        self._file = file
        self.findings: list[Finding] = []

    def fault(self, code: str, message: str, remedy: str) -> None:
        self.findings.append(
            Finding(code=code, severity="error", file=printable(self._file), message=message, remedy=remedy)
        )

    def json_lines(self, text: str) -> Iterator[Row]:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                self._broken(f"line {number}", f"is not JSON: {_reason(error)}")
                continue
            if isinstance(record, dict):
                yield from self._row(record, f"line {number}")
            else:
                self._broken(f"line {number}", 'is not a JSON object such as {"file_name": "1.png", "text": "a fox"}')

    def csv_rows(self, text: str) -> Iterator[Row]:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            columns = reader.fieldnames or []
            if columns and not any(key in columns for key in NAME_KEYS):
                self.fault(
                    "table-columns",
                    f"no column {NAME_KEYS[0]} among {', '.join(columns)}",
                    f"name the columns in the first line, for example {NAME_KEYS[0]},{CAPTION_KEYS[0]}",
                )
                return
            for record in reader:
                where = f"line {reader.line_num}"
                if None in record or None in record.values():
                    self._broken(
                        where,
                        f"does not have {len(columns)} fields like the first line; quote texts that contain commas",
                    )
                else:
                    yield from self._row({key: value or None for key, value in record.items()}, where)
        except csv.Error as error:
            self._broken(f"line {reader.reader.line_num}", f"is not CSV: {error}")

    def json_entries(self, text: str) -> Iterator[Row]:
        twice: list[str] = []

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            record = dict(pairs)
            if len(record) < len(pairs):
                counts = Counter(key for key, _ in pairs)
                twice.extend(key for key, count in counts.items() if count > 1)
            return record

        try:
            entries = json.loads(text, object_pairs_hook=once)
        except json.JSONDecodeError as error:
            self._broken(f"line {error.lineno}", f"is not JSON: {_reason(error)}")
            return
        except (ValueError, RecursionError) as error:
            self._broken("this table", f"is not JSON: {_reason(error)}")
            return
        for key in twice:
            self.fault("row-duplicate", f"the key {key!r} is in one object twice", "keep one of them")
        if not isinstance(entries, dict):
            self._broken("this table", 'is not a JSON object such as {"1.png": {"caption": "a fox"}}')
            return
        for key, record in entries.items():
            if isinstance(record, dict):
                yield from self._row({**record, NAME_KEYS[0]: key}, f"entry {key!r}")
            else:
                self._broken(f"entry {key!r}", 'is not a JSON object such as {"caption": "a fox"}')

    def _row(self, record: Mapping[str, Any], where: str) -> Iterator[Row]:
        name = next((record[key] for key in NAME_KEYS if record.get(key) is not None), None)
        caption = next((record[key] for key in CAPTION_KEYS if record.get(key) is not None), None)
        tags = record.get("tags")
        given_weight = next((record[key] for key in WEIGHT_KEYS if record.get(key) is not None), 1.0)
        weight, faults = _number(given_weight), []
        if not (isinstance(name, str) and name.strip()):
            faults.append(
                f"has no {NAME_KEYS[0]}" if name is None else f"has {NAME_KEYS[0]} = {name!r}, which is not text"
            )
        for value, kind in ((caption, "a caption"), (tags, "tags")):
            if not (value is None or isinstance(value, str) or _is_texts(value)):
                faults.append(f"has {kind}, but not as text: {value!r}")
        if weight is None:
            faults.append(f"has a weight that is not a number from 0: {given_weight!r}")
        if not all(_is_unicode(text) for text in (name, caption, tags)):
            faults.append("contains half of a character (a lone surrogate)")
        for fault in faults:
            self._broken(where, fault)
        if not faults:
            assert isinstance(name, str)
            assert weight is not None
            yield Row(
                name=name.strip().replace("\\", "/"),
                where=where,
                caption="\n".join(caption) if isinstance(caption, list) else caption,
                tags=_one_line(tags),
                weight=weight,
            )

    def _broken(self, where: str, what: str) -> None:
        self.fault("table-broken", f"{where} {what}", "correct it")


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _one_line(tags: str | list[str] | None) -> str:
    lines = tags if isinstance(tags, list) else (tags or "").split("\n")
    return ", ".join(filter(None, (line.strip(" ,\t\r") for line in lines)))


def _is_unicode(value: object) -> bool:
    try:
        str(value).encode()
        "".join(value if isinstance(value, list) and _is_texts(value) else []).encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(value: object) -> float | None:
    """A finite weight from 0; None where ``value`` is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:80]
