"""The folder of the cache: disks that cannot be written to, and the cap on its size."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdlora.cache.entries import cache_info, entries, prune
from sdlora.cache.filling import Job, fill
from sdlora.cache.store import EncodedCache
from sdlora.progress import Silence
from tests.cache_processes import key_of, run_fill, tensors_of
from tests.cached import present, put_aged

# Disks that cannot be written to


def expect_one_warning(caplog: pytest.LogCaptureFixture, folder: Path, reason: str) -> None:
    (record,) = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    message = record.getMessage()
    assert str(folder) in message
    assert reason in message
    assert "cache.disk=false" in message


@contextmanager
def unprivileged() -> Generator[None]:
    """Within the block this process is not the superuser, who may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture(params=["a file in its place", "read-only", "full"])
def unwritable(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, str]]:
    """A folder that cannot be written to, and why."""
    folder = tmp_path / "cache"
    if request.param == "a file in its place":
        folder.write_text("mine")
        yield folder, "Not a directory"
    elif request.param == "read-only":
        run_fill(EncodedCache(tmp_path / "other", 1e9), 1, lambda number: None)  # So that late imports are done.
        with tempfile.TemporaryDirectory() as place:
            Path(place).chmod(0o755)
            folder = Path(place) / "cache"
            EncodedCache(folder, 1e9).put(key_of(99), tensors_of(99))
            for directory in (folder, *(inner for inner in folder.rglob("*") if inner.is_dir())):
                directory.chmod(0o555)
            with unprivileged():
                yield folder, "Permission denied"
            for directory in (folder, *(inner for inner in folder.rglob("*") if inner.is_dir())):
                directory.chmod(0o755)
    else:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        opened = Path.open
        monkeypatch.setattr(
            Path,
            "open",
            lambda path, *rest, **more: (
                opened(Path("/dev/full"), "wb", buffering=0)
                if path.suffix == ".partial"
                else opened(path, *rest, **more)
            ),
        )
        yield folder, "No space left on device"


def test_an_unwritable_disk_costs_time_and_one_warning(
    unwritable: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, reason = unwritable
    before, encoded = [entry.file for entry in entries(folder)], list[int]()
    with EncodedCache(folder, 1e9) as cache:
        for _ in range(2):
            run_fill(cache, 5, encoded.append, seconds=0)
        assert all(cache.get(key_of(99)) is not None for _ in before)
    assert sorted(encoded) == sorted([*range(5)] * 2)
    expect_one_warning(caplog, folder, reason)
    assert folder.is_file() or [file for file in folder.rglob("*") if file.is_file() and file not in before] == []


# The cap


def test_the_least_recently_used_go_first(cache: EncodedCache, tmp_path: Path) -> None:
    size = put_aged(cache, tmp_path / "cache", 10)
    assert cache.get(key_of(2)) is not None
    gone = prune(tmp_path / "cache", size * 4 + size // 2)
    assert [entry.file.stem for entry in gone] == [key_of(number).digest[2:] for number in (0, 1, 3, 4, 5, 6)]
    assert present(cache, 10) == [2, 7, 8, 9]
    assert prune(tmp_path / "cache", size * 4) == ()


def test_a_run_leaves_the_folder_under_its_cap_and_never_goes_far_above(tmp_path: Path) -> None:
    folder, encoded, most = tmp_path / "cache", [], 0
    cap = 50_000

    def measure(number: int) -> None:
        nonlocal most
        most = max(most, cache_info(folder).bytes)
        encoded.append(number)

    jobs = [Job(key=key_of(number), load=lambda number=number: number) for number in range(100)]
    for _ in fill(
        EncodedCache(folder, cap), jobs, lambda n: measure(n) or tensors_of(n, 512), progress=Silence(), task="Encoding"
    ):
        pass
    assert len(encoded) == 100
    assert cap < most < cap * 1.2
    assert cap * 0.9 < cache_info(folder).bytes <= cap


def test_a_process_that_adds_no_entry_removes_none(cache: EncodedCache, tmp_path: Path) -> None:
    put_aged(cache, tmp_path / "cache", 5)
    with EncodedCache(tmp_path / "cache", 1) as other:
        assert present(other, 5) == [0, 1, 2, 3, 4]
    assert present(cache, 5) == [0, 1, 2, 3, 4]


def test_pruning_touches_nothing_but_entries(cache: EncodedCache, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    put_aged(cache, folder, 2)
    fan = next((folder / "latents").iterdir())
    others = [
        folder / "notes.txt",
        folder / "latents" / "x.safetensors",
        fan / "short.safetensors",
        fan / ".new.partial",
    ]
    for file in others:
        file.write_text("mine")
    assert len(prune(folder, 0)) == 2
    assert all(file.exists() for file in others)
    assert prune(tmp_path / "nowhere", 0) == ()
