"""Entries come back as they were put into the cache; damaged ones never do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sdlora.cache.entries import file_of
from sdlora.cache.store import EncodedCache, open_cache
from sdlora.config.sections import CacheSection
from tests.cache_processes import key_of, tensors_of
from tests.cached import only_file, same

# Intact entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_what_is_put_comes_back_as_it_was(cache: EncodedCache, dtype: torch.dtype) -> None:
    whole = (torch.randn(2, 4, 6, 5) * 3).to(dtype)
    halves = whole.transpose(2, 3)
    tensors = {"mean": halves[0], "std": halves[1], "one": whole[0, 0, 0, 0], "none": whole[:0]}
    assert cache.get(key_of(0)) is None
    cache.put(key_of(0), tensors)
    found = cache.get(key_of(0))
    assert same(found, tensors)
    assert found is not None
    found["mean"].zero_()
    assert same(cache.get(key_of(0)), tensors)


def test_an_entry_is_a_safetensors_file_that_says_nothing_about_its_author(cache: EncodedCache, tmp_path: Path) -> None:
    cache.put(key_of(3), tensors_of(3))
    digest = key_of(3).digest
    file = tmp_path / "cache" / "latents" / digest[:2] / f"{digest[2:]}.safetensors"
    assert same(load_file(file), tensors_of(3))
    header = file.read_bytes()[8:].partition(b"\0")[0].decode("ascii", "replace")
    assert not [word for word in (str(tmp_path), os.uname().nodename, "/") if word in header]
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_cache_that_keeps_nothing(tmp_path: Path) -> None:
    none = open_cache(CacheSection(disk=False, folder=str(tmp_path / "unused")))
    none.put(key_of(0), tensors_of(0))
    none.close()
    assert none.get(key_of(0)) is None
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_the_configured_one_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_cache(CacheSection()).put(key_of(0), tensors_of(0))
    open_cache(CacheSection(folder=str(tmp_path / "configured"))).put(key_of(1), tensors_of(1))
    assert only_file(tmp_path / "xdg" / "sdlora" / "encoded").stem == key_of(0).digest[2:]
    assert only_file(tmp_path / "configured").stem == key_of(1).digest[2:]


# Damaged entries


def test_a_truncated_entry_is_a_miss_and_is_removed(cache: EncodedCache, tmp_path: Path) -> None:
    tensors = {"mean": torch.arange(8.0), "std": torch.ones(2)}
    cache.put(key_of(0), tensors)
    file = only_file(tmp_path / "cache")
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert cache.get(key_of(0)) is None, length
        assert not file.exists()
    file.write_bytes(whole)
    assert same(cache.get(key_of(0)), tensors)


def test_any_changed_byte_is_a_miss_or_changes_nothing(cache: EncodedCache, tmp_path: Path) -> None:
    """As after a power cut, when parts of a file may be zeros, or on a failing disk."""
    tensors = {"mean": torch.arange(8.0), "std": torch.ones(2)}
    cache.put(key_of(0), tensors)
    file = only_file(tmp_path / "cache")
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(len(whole)):
        for value in {0, 0x20, 0x7B, 0xFF, whole[position] ^ 1} - {whole[position]}:
            file.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            found = cache.get(key_of(0))
            assert found is None or (position < header and same(found, tensors)), (position, value)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_miss(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-bytes"
    file = file_of(folder, "latents", key_of(0).digest)
    file.parent.mkdir(parents=True, exist_ok=True)
    for content in (data, len(data).to_bytes(8, "little") + data):
        file.write_bytes(content)
        assert EncodedCache(folder, 1e9).get(key_of(0)) is None
        assert not file.exists()


def test_an_entry_in_the_place_of_another_is_a_miss(cache: EncodedCache, tmp_path: Path) -> None:
    cache.put(key_of(0), tensors_of(0))
    misplaced = file_of(tmp_path / "cache", "latents", key_of(1).digest)
    misplaced.parent.mkdir(parents=True, exist_ok=True)
    only_file(tmp_path / "cache").rename(misplaced)
    assert cache.get(key_of(1)) is None


def test_a_removed_entry_is_a_miss_and_can_be_put_again(cache: EncodedCache, tmp_path: Path) -> None:
    cache.put(key_of(0), tensors_of(0))
    only_file(tmp_path / "cache").unlink()
    assert cache.get(key_of(0)) is None
    cache.put(key_of(0), tensors_of(0))
    assert same(cache.get(key_of(0)), tensors_of(0))
