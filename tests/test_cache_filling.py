"""Filling the cache: in order, only missing entries, with several processes at once, and when killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sdlora.cache.entries import cache_info, entries, prune
from sdlora.cache.filling import Job, fill
from sdlora.cache.store import EncodedCache
from sdlora.progress import Silence
from tests.cache_processes import key_of, run_fill, tensors_of
from tests.cached import same
from tests.conftest import ROOT

# Filling


def test_fill_yields_in_order_loads_only_what_is_missing_and_counts(cache: EncodedCache) -> None:
    class Counts(Silence):
        started: tuple[str, int] | None = None
        done = 0

        def start(self, task: str, total: int, done: int = 0) -> None:
            self.started = task, total

        def advance(self, count: int = 1, note: str = "") -> None:
            self.done += count

    for number in (3, 11):
        cache.put(key_of(number), tensors_of(number))
    loaded: list[int] = []

    def load(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        loaded.append(number)
        return number

    progress = Counts()
    jobs = [Job(key=key_of(number), load=lambda number=number: load(number)) for number in range(30)]
    found = list(fill(cache, jobs, tensors_of, progress=progress, task="Encoding"))
    assert all(same(tensors, tensors_of(number)) for number, tensors in enumerate(found))
    assert sorted(loaded) == sorted(set(range(30)) - {3, 11})
    assert (progress.started, progress.done) == (("Encoding", 30), 30)
    assert list(fill(cache, [], tensors_of, progress=progress, task="Nothing")) == []


def test_fill_starts_no_more_jobs_than_allowed(cache: EncodedCache) -> None:
    """Memory stays bounded, however slow the encoder or the consumer is."""
    loaded: list[int] = []
    jobs = [Job(key=key_of(i), load=lambda i=i: loaded.append(i) or i) for i in range(40)]
    yielded = 0
    for _ in fill(cache, jobs, lambda i: tensors_of(i, 64), progress=Silence(), task="Encoding", ahead=4):
        yielded += 1
        time.sleep(0.002)
        assert len(loaded) <= yielded + 4
    assert yielded == 40


def test_threads_that_load_have_one_core_each_and_the_encoder_keeps_its_own(cache: EncodedCache) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        jobs = [Job(key=key_of(i), load=torch.get_num_threads) for i in range(20)]

        def encode(threads: int) -> dict[str, torch.Tensor]:
            return {"load": torch.tensor(threads), "encode": torch.tensor(torch.get_num_threads())}

        found = list(fill(cache, jobs, encode, progress=Silence(), task="Encoding"))
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
    assert {(int(threads["load"]), int(threads["encode"])) for threads in found} == {(1, 3)}


@pytest.mark.parametrize("kept", [True, False])
def test_fill_with_and_without_a_folder(tmp_path: Path, kept: bool) -> None:
    encoded: list[int] = []
    for _ in range(2):
        run_fill(EncodedCache(tmp_path / "cache" if kept else None, 1e9), 12, encoded.append, seconds=0)
    assert sorted(encoded) == sorted([*range(12)] * (1 if kept else 2))


def test_entries_of_another_process_are_not_encoded_again(cache: EncodedCache, tmp_path: Path) -> None:
    other = EncodedCache(tmp_path / "cache", 1e9)
    encoded: list[int] = []

    def encode(number: int) -> dict[str, torch.Tensor]:
        encoded.append(number)
        for later in range(20):
            if later not in encoded:
                other.put(key_of(later), tensors_of(later))
        return tensors_of(number)

    jobs = [Job(key=key_of(number), load=lambda number=number: number) for number in range(20)]
    found = list(fill(cache, jobs, encode, progress=Silence(), task="Encoding"))
    assert len(encoded) == 1
    assert all(same(tensors, tensors_of(number)) for number, tensors in enumerate(found))


def test_the_error_of_a_job_is_raised_and_earlier_entries_are_kept(cache: EncodedCache, tmp_path: Path) -> None:
    def load(number: int) -> int:
        if number == 6:
            raise ValueError("no image")
        return number

    jobs = [Job(key=key_of(i), load=lambda i=i: load(i)) for i in range(30)]
    got: list[dict[str, torch.Tensor]] = []
    with pytest.raises(ValueError, match="no image"):
        got.extend(fill(cache, jobs, tensors_of, progress=Silence(), task="Encoding"))
    assert len(got) <= 6
    assert len(got) <= len(list(entries(tmp_path / "cache"))) <= 6 + 8
    assert all(cache.get(key_of(number)) is not None for number in range(len(got)))


def test_a_filling_that_is_closed_early_stops_its_threads_and_keeps_what_was_encoded(cache: EncodedCache) -> None:
    loaded: list[int] = []
    jobs = [Job(key=key_of(i), load=lambda i=i: loaded.append(i) or i) for i in range(40)]
    filling = fill(cache, jobs, tensors_of, progress=Silence(), task="Encoding")
    next(filling)
    filling.close()
    assert len(loaded) <= 8
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sdlora-load")]
    assert same(cache.get(key_of(0)), tensors_of(0))


# Real processes


def worker(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.cache_processes", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_fifty_kills_leave_a_cache_that_works(tmp_path: Path) -> None:
    folder, count, kills = tmp_path / "cache", 3000, 50
    with worker("kill", folder, count, kills) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    rounds = json.loads(out)
    assert [kill["killed"] for kill in rounds] == [True] * kills
    for kill in rounds:
        assert kill["begun"], "killed before it began"
        # All except the one being encoded or written are there, whole and correct.
        assert kill["kept"] in (kill["begun"], kill["begun"][:-1])
    kept = {number for kill in rounds for number in kill["kept"]}
    # How many come in before a kill depends on the machine; that they add up over the kills does not.
    assert len(kept) > kills // 2
    assert sum(len(kill["begun"]) for kill in rounds) <= len(kept) + kills
    cache = EncodedCache(folder, 1e9)
    assert all(same(cache.get(key_of(number)), tensors_of(number)) for number in kept)
    encoded: list[int] = []
    run_fill(cache, max(kept) + 1, encoded.append, seconds=0)
    assert sorted(encoded) == sorted(set(range(max(kept) + 1)) - kept)
    # Half-written files stay until they are an hour old.
    left = list(folder.rglob("*.partial"))
    assert len(left) <= kills
    for file in left:
        os.utime(file, (1, 1))
    prune(folder, 1e9)
    assert list(folder.rglob("*.partial")) == []
    assert len(list(entries(folder))) == max(kept) + 1


@pytest.mark.parametrize("cap", [1e9, 1e6], ids=["roomy", "tight"])
def test_two_processes_fill_one_cache_together(tmp_path: Path, cap: float) -> None:
    """With a tight cap, each keeps removing entries that the other may be about to read."""
    folder, count = tmp_path / "cache", 250
    processes = [worker("fill", folder, count, cap) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [(process.returncode, err) for process, (_, err) in zip(processes, answers, strict=True)] == [(0, "")] * 2
    encoded = [json.loads(out) for out, _ in answers]
    assert set(encoded[0]) | set(encoded[1]) == set(range(count))
    assert list(folder.rglob("*.partial")) == []
    total = cache_info(folder).bytes
    if cap == 1e6:
        assert 0 < total <= cap
        return
    assert min(map(len, encoded)) > 0
    assert sum(map(len, encoded)) < count * 1.5
    again: list[int] = []
    run_fill(EncodedCache(folder, cap), count, again.append)
    assert again == []
