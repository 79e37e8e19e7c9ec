"""Files and folders that appear whole or not at all, paths that can be printed anywhere, and the user's cache folder."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import TargetError

if TYPE_CHECKING:
    from PIL.Image import Image

PARTIAL_SUFFIX = ".partial"
"""Suffix of files and folders that are being written; an old one was left by a process that was killed."""
WINDOWS_PATH = 259
"""Characters of a whole path, at most, on a Windows that does not allow long ones (its MAX_PATH without the final zero)."""
LONGEST_NAME = 255
"""Characters of the name of a file, at most."""


def cache_folder() -> Path:
    """Folder for what can be made again at the cost of time; it is not created here. ``XDG_CACHE_HOME`` moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdlora"


def printable(path: Path) -> str:
    """``path`` as text that any terminal and any file can hold; bytes that are not UTF-8 become escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def check_target(target: Path, kind: Literal["file", "folder", "new folder"] = "file") -> None:
    """Find out before the work whether its result can be written, by creating and removing a small file.

    Args:
        kind: ``folder`` is one that files are written into; ``new folder`` is made whole, as ``whole_folder`` does.

    Raises:
        TargetError: ``target`` is a folder where a file is meant or the reverse, or its place cannot be written to.
    """
    try:
        if kind == "file" and target.is_dir():
            raise TargetError(f"{printable(target)}: is a folder; name a file to write, for example one in it")
        if kind != "file" and target.exists() and not target.is_dir():
            raise TargetError(f"{printable(target)}: is a file; name a folder to write into")
        place = target if kind == "folder" else target.parent
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise TargetError(f"{printable(target)}: {printable(place)} is a file; choose a name within a folder")
        probe = _probe(place, target)
        try:
            probe.write_bytes(b"probe")
        except OSError as error:
            raise OSError(error.errno, _reason(error, probe)) from None
        finally:
            with suppress(OSError):
                probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TargetError(f"{printable(target)}: cannot be written ({reason}); choose another place") from None


def write_whole(path: Path, *chunks: bytes, durable: bool = True) -> None:
    """Write ``chunks`` to ``path``, which holds either its old content or all of the new one at any time.

    Args:
        durable: also after a power failure. It costs waiting for the disk; without it the file may be torn then.

    Raises:
        OSError: the disk is full or cannot be written to; no partial file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _written_beside(path, chunks, durable=durable) as partial:
        os.replace(partial, path)
    if durable:
        _sync_folder(path.parent)


def rename_whole(written: Path, path: Path) -> None:
    """Give the complete file ``written`` the name ``path`` on the same disk, also after a power failure.

    Raises:
        OSError: the disk cannot be written to; both files are as they were.
    """
    os.replace(written, path)
    _sync_folder(path.parent)


def write_new(path: Path, *chunks: bytes) -> bool:
    """Write ``chunks`` to ``path`` as ``write_whole`` does; False, and nothing is written, if the file exists by then.

    Raises:
        OSError: the folder is missing, the disk is full or cannot be written to; no partial file remains.
    """
    with _written_beside(path, chunks, durable=True) as partial:
        try:
            os.link(partial, path)  # Fails where the file exists, as a rename would not.
        except FileExistsError:
            return False
        except OSError:  # A file system without links.
            if path.exists():
                return False
            os.rename(partial, path)
    return True


def write_png(path: Path, image: Image, texts: Iterable[tuple[str, str]] = ()) -> None:
    """Write the ``png_bytes`` of ``image`` to ``path``. Raises as ``write_whole``."""
    write_whole(path, png_bytes(image, texts))


def png_bytes(image: Image, texts: Iterable[tuple[str, str]] = ()) -> bytes:
    """``image`` as a PNG file with ``texts`` (keyword, text) as its text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), BytesIO()
    for keyword, text in texts:
        info.add_text(keyword, text)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@contextmanager
def whole_file(target: Path) -> Generator[Path]:
    """The name of a new file beside ``target`` to be filled; it becomes ``target`` after the block.

    After any error in the block it is removed, and ``target`` is as it was.

    Raises:
        OSError: the disk is full or cannot be written to; it names ``target``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _written_beside(target, (), durable=False) as partial:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    _sync_folder(target.parent)


@contextmanager
def whole_folder(target: Path) -> Generator[Path]:
    """A new folder beside ``target`` to be filled; it becomes ``target``, absent or empty until then, after the block.

    After any error in the block it is removed with its content, and ``target`` is as it was.

    Raises:
        OSError: the folder cannot be made, or ``target`` is neither absent nor an empty folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(target)
    try:
        partial.mkdir(0o755)
    except OSError as error:
        raise OSError(error.errno, _reason(error, partial), str(target)) from None
    try:
        yield partial
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _written_beside(path: Path, chunks: Iterable[bytes], *, durable: bool) -> Generator[Path]:
    """A file beside ``path`` that holds ``chunks``; it is removed after the block if it is still there.

    An ``OSError``, also one of the block, names ``path``.
    """
    partial = _partial_name(path)
    try:
        with partial.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        yield partial
    except OSError as error:
        raise OSError(error.errno, _reason(error, partial), str(path)) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}")


def _probe(place: Path, target: Path) -> Path:
    """A new name in ``place``; on Windows as long a path as ``target`` leads to, since its length is refused alike."""
    probe = _partial_name(place / "probe")
    if not _is_windows():
        return probe
    missing = max(len(os.path.abspath(path)) for path in (target, _partial_name(target))) - len(os.path.abspath(probe))
    return probe.with_name("x" * min(missing, LONGEST_NAME - len(probe.name)) + probe.name)


def _sync_folder(folder: Path) -> None:
    """Make a new name in ``folder`` last through a power failure, where that can be done.

    Windows opens no folders, nor can a folder be opened that may only be written to; some file systems sync none.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _reason(error: OSError, written: Path) -> str | None:
    """What ``error`` says of ``written``, or what Windows does not say: that the path is too long."""
    length = len(os.path.abspath(written))
    if not _is_windows() or length <= WINDOWS_PATH:
        return error.strerror
    return (
        f"the path has {length} characters and this Windows takes {WINDOWS_PATH}: use a shorter path, or allow long paths "
        r"with the registry's HKLM\SYSTEM\CurrentControlSet\Control\FileSystem\LongPathsEnabled = 1"
    )


def _is_windows() -> bool:
    return sys.platform == "win32"
