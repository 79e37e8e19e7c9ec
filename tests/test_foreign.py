"""Files that ``tests/foreign/make.py`` wrote by hand, one for each format and kind: read completely, same changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlora.formats.keys import resolve
from sdlora.formats.lora_file import read_lora
from sdlora.formats.published import published_modules

FOLDER = Path(__file__).parent / "foreign"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
CHANGES = load_file(FOLDER / "expected.safetensors")


def weight(shape: tuple[int, ...]) -> torch.Tensor:
    """As ``make.py`` has it."""
    count = torch.Size(shape).numel()
    return torch.sin(1.0 + torch.arange(count, dtype=torch.float64)).reshape(shape)


@pytest.mark.parametrize("name", EXPECTED)
def test_foreign_files_are_read_completely(name: str) -> None:
    lora, expected = read_lora(FOLDER / f"{name}.safetensors"), EXPECTED[name]
    assert (lora.format, lora.problems, list(lora.embeddings)) == (expected["format"], (), expected["embeddings"])
    found = resolve(lora.modules, published_modules("sdxl"))
    assert found.unmatched == ()
    assert {name: lora.modules[key].kind for key, name in found.matched.items()} == expected["modules"]
    for key, module in found.matched.items():
        change = CHANGES[f"{name}|{module}"]
        delta = lora.modules[key].delta(weight(tuple(change.shape)))
        torch.testing.assert_close(delta, change, rtol=1e-6, atol=1e-6)
        assert change.abs().max() > 0.01


def test_every_tensor_is_accounted_for() -> None:
    for name in EXPECTED:
        lora, stored = read_lora(FOLDER / f"{name}.safetensors"), load_file(FOLDER / f"{name}.safetensors")
        used = [tensor for module in lora.modules.values() for tensor in module.tensors().values()]
        alphas = sum(tensor_name.endswith(".alpha") for tensor_name in stored)
        embeddings = sum(tensor_name.startswith("bundle_emb.") for tensor_name in stored)
        assert len(used) + alphas + embeddings == len(stored)


def test_there_is_a_file_for_each_expectation() -> None:
    assert {file.stem for file in FOLDER.glob("*.safetensors")} == {*EXPECTED, "expected"}
