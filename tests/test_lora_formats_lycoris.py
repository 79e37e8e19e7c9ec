"""What LyCORIS' and PEFT's own modules save, read to the change that their own code applies."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.modules.dylora import DyLoraModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

from sdlora.errors import LoraFileError
from sdlora.formats.lora_file import read_lora
from sdlora.formats.peft_settings import scales_from


@torch.no_grad()
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 1), nn.Linear(6, 8)], ids=["3x3", "1x1", "linear"]
)
def test_dylora_keeps_a_convolution_in_matrices_of_different_axes(layer: nn.Module, tmp_path: Path) -> None:
    module = DyLoraModule("x", layer, lora_dim=4, alpha=3, block_size=4)
    for parameter in (*module.up_list, *module.down_list):
        parameter.copy_(torch.randn_like(parameter))
    stored = {f"lora_unet_x.{k}": v.detach().contiguous() for k, v in module.custom_state_dict().items()}
    save_file(stored, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    assert lora.problems == ()
    (change,) = lora.modules.values()
    up, down = (torch.cat(list(part), axis) for part, axis in ((module.up_list, 1), (module.down_list, 0)))
    weight = layer.get_parameter("weight").double()
    expected = (up.double() @ down.double() * (3 / 4)).reshape(weight.shape)
    torch.testing.assert_close(change.delta(weight), expected, rtol=1e-12, atol=1e-12)
    assert change.fits(tuple(weight.shape))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(12, 8)
        self.conv = nn.Conv2d(4, 8, 3)


PATTERNS = {"alpha_pattern": {"fir.*": 24, "first": 5, "sec[o]nd|x": 6}, "rank_pattern": {".*ond": 2, "second": 3}}
NAMES = ["first", "second", "conv"]
ADAPTERS = {
    "loha": LoHaConfig(r=4, alpha=8, target_modules=NAMES),
    "loha-tucker": LoHaConfig(r=4, alpha=8, target_modules=NAMES, use_effective_conv2d=True),
    "loha-patterns": LoHaConfig(r=4, alpha=8, target_modules=NAMES, **PATTERNS),
    "lokr": LoKrConfig(r=2, alpha=6, target_modules=NAMES),
    "lokr-both": LoKrConfig(r=1, alpha=6, target_modules=NAMES, decompose_both=True),
    "lokr-tucker": LoKrConfig(r=2, alpha=6, target_modules=NAMES, use_effective_conv2d=True),
    "lokr-whole": LoKrConfig(r=32, alpha=1, target_modules=NAMES),
    "lokr-whole-uneven": LoKrConfig(r=31, alpha=3, target_modules=NAMES),
    "lora-patterns": LoraConfig(r=4, lora_alpha=8, target_modules=NAMES, **PATTERNS),
}


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_peft_folder_is_read_to_the_change_of_peft_s_forward(name: str, tmp_path: Path) -> None:
    plain, model = Tiny(), get_peft_model(Tiny(), ADAPTERS[name])
    for key, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) if "base_layer" not in key else parameter)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    assert lora.problems == ()
    assert lora.modules.keys() == set(NAMES)
    for key, change in lora.modules.items():
        changed, layer = model.base_model.model.get_submodule(key), plain.get_submodule(key)
        weight = changed.base_layer.weight
        layer.weight.copy_(weight + change.delta(weight))
        layer.bias.copy_(changed.base_layer.bias)
        data = torch.randn(2, 4, 5, 5) if key == "conv" else torch.randn(2, 12)
        torch.testing.assert_close(layer(data), changed(data), rtol=1e-4, atol=1e-4)
        assert change.delta(weight).abs().max() > 1e-3


PIECES = ["attn1", "attn2", "to_q", "to_k", "to", "0", "1", "10", "blocks", "xattn1", "a-b"]
PATHS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(".".join)
EXPRESSIONS = st.one_of(
    PATHS,
    st.sampled_from(
        [r"attn\d\.to_(q|k)", ".*to_q", "to_q|to_k", "blocks.*", "attn1_to_q", "[ab]ttn1.to_k", "(?!0).*", ""]
    ),
)


@given(patterns=st.lists(EXPRESSIONS, max_size=6, unique=True), path=PATHS)
@settings(max_examples=300, deadline=None)
def test_patterns_are_peft_s(patterns: list[str], path: str) -> None:
    values = {pattern: index + 1.0 for index, pattern in enumerate(patterns)}
    scale = scales_from(Path("x"), {"": {"lora_alpha": 99, "alpha_pattern": values, "r": 7, "rank_pattern": values}})(
        path
    )
    expected = values.get(get_pattern_key(list(values), path))
    assert (scale.alpha, scale.rank) == ((99, 7) if expected is None else (expected, expected))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("to_(q", "'to_(q' is not a regular expression"),
        ("(?P<x>a)(?P<x", "is not a regular expression"),
        ("(a|aa)+c|zb", "takes longer than"),
        (r"([ab]|a.)*\d{2}", "takes longer than"),
        ("x" * 1001 + "*", "1,002 characters long"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_named(
    pattern: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdlora.formats.peft_settings.MAX_SECONDS", 0.3)
    module = "a" * 150 + "b.to_q"
    tensors = {f"unet.{module}.lora_A.weight": torch.ones(2, 3), f"unet.{module}.lora_B.weight": torch.ones(3, 2)}
    header = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 1}})
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": header})
    start = time.monotonic()
    with pytest.raises(LoraFileError, match=re.escape(message)) as fault:
        read_lora(tmp_path / "x.safetensors")
    assert time.monotonic() - start < 5
    assert str(fault.value).startswith(f"{tmp_path / 'x.safetensors'}: alpha_pattern ")
