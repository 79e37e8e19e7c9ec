"""What LyCORIS' and PEFT's own modules save, read to the change that their own code applies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lycoris.modules.dylora import DyLoraModule
from safetensors.torch import save_file
from torch import nn

from sdlora.formats.lora_file import read_lora


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
