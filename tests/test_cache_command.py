"""``sdlora cache``: what it reports about the folder, what it removes, and wrong uses."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.cache.entries import entries, file_of
from sdlora.cache.keys import text_key
from sdlora.cache.store import EncodedCache, open_cache
from sdlora.config.sections import CacheSection
from tests.cache_processes import key_of, tensors_of
from tests.cached import present, put_aged

CPU = torch.device("cpu")


def test_cache_verbs(
    sdlora: Callable[..., subprocess.CompletedProcess[str]], cache: EncodedCache, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    size = put_aged(cache, folder, 4)
    key = text_key(ids=[torch.ones(1, 77)], weights=[torch.ones(1, 77)], encoders="e", dtype=torch.float32, device=CPU)
    cache.put(key, {"context": torch.ones(77, 8)})
    small = os.path.getsize(file_of(folder, "text", key.digest))
    info = json.loads(sdlora("cache", "info", "--folder", folder, "--json").stdout)
    assert info.pop("newest").startswith("20")
    assert info == {
        "folder": str(folder),
        "entries": 5,
        "bytes": 4 * size + small,
        "oldest": "1970-01-01T00:16:40+00:00",
        "kinds": {"latents": {"entries": 4, "bytes": 4 * size}, "text": {"entries": 1, "bytes": small}},
    }
    assert "5 entries" in sdlora("cache", "info", "--folder", folder).stdout
    pruned = json.loads(
        sdlora("cache", "prune", "--folder", folder, "--max-gigabytes", (2 * size + small) / 1e9, "--json").stdout
    )
    assert (pruned["removed"], pruned["removed_bytes"], pruned["left"]["entries"]) == (2, 2 * size, 3)
    assert present(cache, 4) == [2, 3]
    assert "0 entries removed" in sdlora("cache", "prune", "--folder", folder).stdout
    assert "3 entries removed" in sdlora("cache", "prune", "--folder", folder, "--all").stdout
    assert list(entries(folder)) == []


def test_cache_verbs_use_the_users_folder(
    sdlora: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    info = json.loads(sdlora("cache", "info", "--json").stdout)
    assert (info["folder"], info["entries"], info["oldest"]) == (str(tmp_path / "xdg/sdlora/encoded"), 0, None)
    assert not (tmp_path / "xdg").exists()
    open_cache(CacheSection()).put(key_of(0), tensors_of(0))
    assert json.loads(sdlora("cache", "prune", "--all", "--json").stdout)["removed"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("info", "--folder", "nowhere"), 1, "nowhere: no such folder"),
        (("prune", "--folder", "nowhere", "--all"), 1, "nowhere: no such folder"),
        (("prune", "--all", "--max-gigabytes", "1"), 2, "--max-gigabytes or --all"),
        (("prune", "--max-gigabytes", "nan"), 2, "--max-gigabytes"),
        (("prune", "--max-gigabytes", "-1"), 2, "--max-gigabytes"),
    ],
)
def test_wrong_uses_of_the_cache_verbs(
    sdlora: Callable[..., subprocess.CompletedProcess[str]], arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = sdlora("cache", *arguments)
    assert result.returncode == code
    assert message in " ".join(re.sub("[│\n]", " ", result.stderr).split())
    assert "Traceback" not in result.stderr
