"""The index: what the headers of files said, in an SQLite database in the user's cache folder.

It holds nothing that cannot be read again, so a damaged or foreign database is replaced, and where none can be kept
everything works without, at the speed of the first time.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..files import cache_folder
from .facts import TableFacts
from .header import HeaderFacts

VERSION = 2
"""Raised whenever what is kept, or what is read from a header, changes: an older index is replaced."""
WAIT = 5.0
"""Seconds to wait while another process writes."""
_TABLES = """
CREATE TABLE IF NOT EXISTS layouts (digest TEXT PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, modified INTEGER NOT NULL, card INTEGER NOT NULL,
    layout TEXT, facts TEXT, words TEXT NOT NULL, problem TEXT, sha256 TEXT, payload_sha256 TEXT
) WITHOUT ROWID;
"""
_UNUSABLE = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOLFS),
}
"""Errors that say nothing against the content of the file."""
Stamp = tuple[int, int, int]
"""Size and modification time of a file, modification time of its card."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class IndexedFile:
    """A file as it was when its header was read; it has a ``layout`` and ``facts``, or a ``problem``."""

    path: str
    stamp: Stamp
    layout: str | None
    """Digest of its table of tensors."""
    facts: HeaderFacts | None
    problem: str | None
    sha256: str | None = None
    """Hash of the whole file; None until it was computed, as the next."""
    payload_sha256: str | None = None

    words: str = ""
    """Where searches look; written, and not read back."""


def index_file() -> Path:
    """Where the index is kept."""
    return cache_folder() / "library" / "index.sqlite"


def with_index(work: Callable[[Index], T], file: Path | None = None) -> T:
    """``work`` on the index in ``file``, by default the user's; a damaged one is replaced and ``work`` done again."""
    file = file or index_file()
    for _ in range(2):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(file, timeout=WAIT)) as connection:
                return work(Index(connection))
        except OSError:
            break
        except sqlite3.Error as error:
            # The code may say more than the kind of error does, in higher bits.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _UNUSABLE:
                break
            _remove(file)
        except DamagedIndexError:
            _remove(file)
    with closing(sqlite3.connect(":memory:")) as connection:
        return work(Index(connection))


def _remove(file: Path) -> None:
    for name in (file.name, f"{file.name}-journal"):
        with suppress(OSError):
            file.with_name(name).unlink()


class DamagedIndexError(Exception):
    """A database in which something else is written than this program writes."""


class Index:
    """An open index; see ``with_index``. All methods may raise ``sqlite3.Error`` and ``DamagedIndexError``."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        connection.execute("PRAGMA synchronous = OFF")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise DamagedIndexError
        if version == 0:
            connection.executescript(f"{_TABLES} PRAGMA user_version = {VERSION};")

    def stamps(self, folder: Path) -> dict[str, Stamp]:
        """Path -> stamp, of every file that is known in ``folder`` and below."""
        rows = self._connection.execute(
            "SELECT path, size, modified, card FROM files WHERE path > ? AND path < ?", _range(folder)
        )
        return {os.fsdecode(path): (size, modified, card) for path, size, modified, card in rows}

    def layouts(self) -> dict[str, TableFacts]:
        """Digest of a table of tensors -> what it shows."""
        return {
            digest: _read(TableFacts.from_json, text)
            for digest, text in self._connection.execute("SELECT * FROM layouts")
        }

    def files(self, folder: Path, words: Sequence[str] = ()) -> Iterator[IndexedFile]:
        """The files in ``folder`` and below that have all of ``words``, in lower case, or a problem; by path."""
        condition = "".join(" AND instr(words, ?)" for _ in words)
        rows = self._connection.execute(
            "SELECT path, size, modified, card, layout, facts, problem, sha256, payload_sha256 FROM files "
            f"WHERE path > ? AND path < ?{condition} ORDER BY path",
            (*_range(folder), *words),
        )
        for path, size, modified, card, layout, facts, problem, sha256, payload_sha256 in rows:
            yield IndexedFile(
                path=os.fsdecode(path),
                stamp=(size, modified, card),
                layout=layout,
                facts=None if facts is None else _read(HeaderFacts.from_json, facts),
                problem=problem,
                sha256=sha256,
                payload_sha256=payload_sha256,
            )

    def write(self, files: Sequence[IndexedFile], layouts: Mapping[str, TableFacts]) -> None:
        """Keep ``files`` in the place of what was known of them, and the ``layouts`` that they refer to."""
        with self._connection:
            self._connection.executemany(
                "INSERT OR IGNORE INTO layouts VALUES (?, ?)",
                [(digest, json.dumps(facts.to_json())) for digest, facts in layouts.items()],
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(os.fsencode(file.path), *file.stamp, file.layout),
                        None if file.facts is None else json.dumps(file.facts.to_json()),
                        file.words,
                        *(file.problem, file.sha256, file.payload_sha256),
                    )
                    for file in files
                ],
            )

    def keep_hashes(self, file: IndexedFile) -> None:
        """Keep the hashes of ``file``, and what else is known of it as it is."""
        with self._connection:
            self._connection.execute(
                "UPDATE files SET sha256 = ?, payload_sha256 = ? WHERE path = ?",
                (file.sha256, file.payload_sha256, os.fsencode(file.path)),
            )

    def remove(self, paths: Iterable[str]) -> None:
        """Forget files."""
        with self._connection:
            self._connection.executemany("DELETE FROM files WHERE path = ?", [(os.fsencode(path),) for path in paths])


def _range(folder: Path) -> tuple[bytes, bytes]:
    """Between these two are all paths below ``folder``, and no others."""
    inside = os.fsencode(os.path.join(os.path.abspath(folder), ""))
    return inside, inside[:-1] + bytes([inside[-1] + 1])


def _read(make: Callable[[Any], T], text: str) -> T:
    try:
        return make(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedIndexError from None
