"""What ``inspect`` reports on a LoRA file, with files that are made for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdlora
from sdlora.errors import LoraFileError
from sdlora.families import FAMILIES
from sdlora.formats.lora_writer import write_lora
from sdlora.formats.metadata_file import read_metadata, write_metadata
from sdlora.formats.published import published_modules
from sdlora.lora.low_rank import LowRank


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A UNet with two ranks, and nothing for the text encoder."""
    names = sorted(name for name in published_modules("sd1") if name.endswith("attn1.to_q"))[:6]
    changes = {}
    for number, name in enumerate(names):
        rank, (out, inner) = 4 if number else 8, published_modules("sd1")[name][:2]
        changes[name] = LowRank(down=torch.randn(rank, inner), up=torch.randn(out, rank), alpha=2.0)
    tags = {"pics": {"zorb": 3, "cat": 1}, "more": {"cat": 4}}
    stated = {"ss_base_model_version": "sd_v1", "ss_num_train_images": "5", "ss_tag_frequency": json.dumps(tags)}
    write_lora(tmp_path / "x.safetensors", changes, stated, dtype=torch.float32, family=FAMILIES["sd1"])
    return tmp_path / "x.safetensors"


def rewritten(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors, metadata = load_file(file), read_metadata(file)
    change(tensors)
    save_file(tensors, file, metadata)
    return file


def test_ranks_and_norms_are_reported_by_part(lora: Path) -> None:
    report = sdlora.inspect(lora)
    stored = load_file(lora)
    exact = 0.0
    for name, down in stored.items():
        if name.endswith("lora_down.weight"):
            up = stored[name.replace("lora_down", "lora_up")]
            exact += float((up.double() @ down.double() * 2 / down.shape[0]).norm()) ** 2
    assert report.parts is not None
    unet = report.parts["unet"]
    assert set(report.parts) == {"unet"}
    assert (unet.modules, unet.rank.min, unet.rank.median, unet.rank.max) == (6, 4, 4, 8)
    assert (unet.alpha.min, unet.alpha.max, unet.scale.min, unet.scale.max) == (2, 2, 0.25, 0.5)
    assert unet.norm == pytest.approx(exact**0.5, rel=1e-6)
    assert report.tags == {"cat": 5, "zorb": 3}
    assert report.trigger == ("cat",)
    assert report.notes == ("its text encoder is untouched",)
    assert report.problems == ()


def test_what_is_wrong_is_reported(lora: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        names = sorted(name for name in tensors if name.endswith("lora_up.weight"))
        tensors[names[0]][0, 0] = torch.nan
        tensors[names[1]][0, 0] = torch.inf
        tensors[names[2]].zero_()

    report = sdlora.inspect(rewritten(lora, spoil))
    text = "\n".join(report.problems)
    assert "the hash in the header is stale (sshs_model_hash)" in text
    assert "the hash in the header is stale (modelspec.hash_sha256)" in text
    assert "NaN or infinity in 2 modules, such as lora_unet_down_blocks_0" in text
    assert report.parts is not None
    assert report.parts["unet"].modules == 4
    assert any("1 of 4 modules have all-zero up matrices and change nothing" in note for note in report.notes)


def test_a_lora_without_effect_and_one_without_a_usable_module(lora: Path) -> None:
    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("lora_up.weight"):
                tensor.zero_()

    assert "unet: every change is zero; it has no effect" in sdlora.inspect(rewritten(lora, silence)).problems

    def destroy(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(torch.nan)

    with pytest.raises(LoraFileError, match="none of its 6 modules can be used") as caught:
        sdlora.inspect(rewritten(lora, destroy))
    assert len(caught.value.problems) == 1


def test_hashes_in_capitals_are_not_stale(lora: Path) -> None:
    metadata = read_metadata(lora)
    write_metadata(lora, lora, metadata | {"sshs_model_hash": metadata["sshs_model_hash"].upper()})
    assert sdlora.inspect(lora).problems == ()


def test_the_text_shows_it_and_cuts_what_is_long(lora: Path, sdlora: Callable[..., CompletedProcess[str]]) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for number in range(30):
            tensors[f"strange_{number}"] = torch.ones(1)

    shown = sdlora("inspect", rewritten(lora, spoil)).stdout
    assert "  unet     rank 4 … 8, median 4; alpha 2; scale 0.25 … 0.5, median 0.5; ‖ΔW‖ " in shown
    assert "  tags     cat 5, zorb 3" in shown
    assert "  … and 20 more problems, all with --json" in shown
    whole = json.loads(sdlora("inspect", lora, "--json").stdout)
    assert sum("strange_" in problem for problem in whole["problems"]) == 30
    assert whole["rank"] == {"min": 4, "median": 4.0, "max": 8}
    assert whole["parts"]["unet"]["scale"]["max"] == 0.5
