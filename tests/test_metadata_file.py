"""Metadata shown, changed and cleaned; the tensors and their hashes stay as they are."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sdlora.errors import LoraFileError
from sdlora.formats.hashes import hash_file
from sdlora.formats.metadata_file import read_metadata, write_metadata
from sdlora.formats.redaction import redacted
from sdlora.formats.safetensors_file import read_header
from tests.conftest import run_sdlora


def written(file: Path, metadata: dict[str, str]) -> Path:
    tensors = {"b.lora_up.weight": torch.randn(300_000), "a.lora_down.weight": torch.randn(3, 4).half()}
    save_file(tensors, file, metadata=metadata)
    return file


def hashes(file: Path):
    return hash_file(file, read_header(file, LoraFileError).payload_start)


def test_changing_metadata_changes_only_the_hashes_of_the_whole_file(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", {"ss_seed": "1", "sshs_legacy_hash": "old"})
    before, bytes_before = hashes(file), file.read_bytes()
    write_metadata(file, tmp_path / "y.safetensors", {"ss_seed": "2", "sshs_legacy_hash": "old", "ü": "ö\n"})
    after = hashes(tmp_path / "y.safetensors")
    assert (after.payload_sha256, after.autov3) == (before.payload_sha256, before.autov3)
    assert after.sha256 != before.sha256
    assert file.read_bytes() == bytes_before
    metadata = read_metadata(tmp_path / "y.safetensors")
    write_metadata(tmp_path / "y.safetensors", tmp_path / "z.safetensors", {"ss_seed": "2"})
    assert metadata["sshs_legacy_hash"] == hashes(tmp_path / "z.safetensors").autov1
    assert metadata["ü"] == "ö\n"
    with safe_open(tmp_path / "y.safetensors", framework="pt") as one, safe_open(file, framework="pt") as other:
        assert set(one.keys()) == set(other.keys())
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in other.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("/home/jane doe/models/my base.safetensors", "my base.safetensors"),
        (r"C:\Users\jane\sd\v1-5.ckpt", "v1-5.ckpt"),
        ("\\\\server\\share\\v1-5.ckpt", "v1-5.ckpt"),
        ("~/models/x.safetensors", "x.safetensors"),
        ("trained with /home/jane/sd/train.py, by jane@example.org", "trained with train.py, by "),
        ('{"/home/jane/10_cat": {"n": 1, "l": ["D:/pics/a b/c.png"]}}', '{"10_cat": {"n": 1, "l": ["c.png"]}}'),
        ("a/b testing, 1/2, and/or", "a/b testing, 1/2, and/or"),
        ("https://github.com/kohya-ss/sd-scripts/tree/main", "https://github.com/kohya-ss/sd-scripts/tree/main"),
        ("stable-diffusion-v1/lora", "stable-diffusion-v1/lora"),
        ("data:image/jpeg;base64,/9j/4AAQSk/ZJRg/abc", "data:image/jpeg;base64,/9j/4AAQSk/ZJRg/abc"),
        ("{broken /home/jane/x", "{broken x"),
        ("None", "None"),
    ],
)
def test_places_are_taken_out_and_the_rest_stays(value: str, clean: str) -> None:
    assert redacted({"key": value}) == {"key": clean}
    assert redacted(redacted({"key": value})) == {"key": clean}


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1), min_size=2, max_size=5))
def test_no_folder_survives(names: list[str]) -> None:
    folders = [f"secret{name}" for name in names[:-1]]
    for path in ("/" + "/".join([*folders, names[-1]]), "C:\\" + "\\".join([*folders, names[-1]])):
        tree = json.dumps({path: [f"see {path}", path]})
        for value in (path, f"see {path}", tree):
            assert "secret" not in redacted({"key": value})["key"]


def test_the_commands(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", {"ss_sd_model_name": "/home/jane/b.safetensors", "a": "1"})
    assert "a: 1" in run_sdlora("metadata", "show", file, cwd=tmp_path).stdout
    run_sdlora("metadata", "set", file, "a=", "modelspec.title=My LoRA", "--out", "y.safetensors", cwd=tmp_path)
    stated = json.loads(run_sdlora("metadata", "show", "y.safetensors", "--json", cwd=tmp_path).stdout)
    assert stated == {"modelspec.title": "My LoRA", "ss_sd_model_name": "/home/jane/b.safetensors"}
    result = run_sdlora("metadata", "redact", "y.safetensors", "--out", "y.safetensors", cwd=tmp_path)
    assert result.stdout == "y.safetensors: 1 of 2 values changed\n  ss_sd_model_name\n"
    assert read_metadata(tmp_path / "y.safetensors")["ss_sd_model_name"] == "b.safetensors"
    assert run_sdlora("metadata", "set", file, "what", "--out", "z.safetensors", cwd=tmp_path).returncode == 2
    before = file.read_bytes()
    taken = run_sdlora("metadata", "redact", "y.safetensors", "--out", file, cwd=tmp_path)
    assert taken.stderr == f"error: {file}: exists already; choose another name, or that of y.safetensors itself\n"
    assert file.read_bytes() == before
    missing = run_sdlora("metadata", "show", "none.safetensors", cwd=tmp_path)
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)


def test_a_thousand_files_are_listed_in_two_seconds(tmp_path: Path) -> None:
    metadata = {f"ss_key_{i}": "value " * 20 for i in range(100)}
    tensors = {f"lora_unet_{i}.lora_down.weight": torch.zeros(1) for i in range(800)}
    save_file(tensors, tmp_path / "0.safetensors", metadata=metadata)
    data = (tmp_path / "0.safetensors").read_bytes()
    for i in range(1, 1000):
        (tmp_path / f"{i}.safetensors").write_bytes(data)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        assert all(len(read_metadata(file)) == 100 for file in tmp_path.iterdir())
        times.append(time.perf_counter() - began)
    assert min(times) < 2
