"""The tables of tensor names, at full size, against diffusers' own converters: every key once, there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import nn

from sdlora.base.architecture import unet_config
from sdlora.families import FAMILIES, SDXL
from sdlora.formats import checkpoint_keys as keys
from tests.published import UNET_PARAMETERS, UNETS, our_names, published

CLIP_TOP = ("text_projection", "positional_embedding", "token_embedding.weight", "ln_final.weight", "ln_final.bias")


def numel(names: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in names.values())


def tables(part: str, names: set[str], facts: Any) -> tuple[keys.Table, Callable[[set[str]], keys.Table]]:
    """Our table to LDM, and the way back from LDM's names."""
    if part == "unet":
        return keys.unet_table_to_ldm(names), keys.unet_table_from_ldm
    if part == "vae":
        return keys.vae_table_to_ldm(names), keys.vae_table_from_ldm
    if facts.spelling == "open_clip":
        return keys.clip_table_to_open_clip(names), lambda stored: keys.clip_table_from_open_clip(
            stored, unread_layers=0
        )
    return keys.clip_table_from_transformers(names), keys.clip_table_from_transformers


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_key_at_full_size_is_reached_once_and_back(name: str) -> None:
    family = FAMILIES[name]
    for part, model in published(name).items():
        names = our_names(part, model)
        facts = next((encoder for encoder in family.text_encoders if encoder.part == part), None)
        there, back = tables(part, set(names), facts)
        assert set(there) == set(names)
        places = {(stored.name, stored.third) for stored in there.values()}
        assert len(places) == len(names)
        again = back({stored.name for stored in there.values()})
        assert again == there
        if part == "unet":
            assert numel(names) == UNET_PARAMETERS[name]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_unet_names_are_those_that_diffusers_reads(name: str) -> None:
    names = our_names("unet", published(name)["unet"])
    table = keys.unet_table_to_ldm(names)
    numbered = {ours: torch.tensor(float(i)) for i, ours in enumerate(names)}
    stored = {f"model.diffusion_model.{table[ours].name}": value for ours, value in numbered.items()}
    kind = "projection" if name == "sdxl" else None
    config = {**UNETS[name], "layers_per_block": 2, "class_embed_type": None, "num_class_embeds": None}
    config.setdefault("addition_embed_type", kind)
    assert convert_ldm_unet_checkpoint(stored, config) == numbered


def test_vae_names_are_those_that_diffusers_reads() -> None:
    names = our_names("vae", published("sd1")["vae"])
    table = keys.vae_table_to_ldm(names)
    numbered = {ours: torch.full((1, 1), float(i)) for i, ours in enumerate(names)}
    stored = {f"first_stage_model.{table[ours].name}": value[:, :, None, None] for ours, value in numbered.items()}
    config = {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    read = convert_ldm_vae_checkpoint(stored, config)
    assert read.keys() == numbered.keys()
    for ours, value in numbered.items():
        assert read[ours].flatten() == value.flatten(), ours


def test_open_clip_names_are_those_that_diffusers_reads() -> None:
    model = published("sdxl")["text_encoder_2"]
    width, names = 4, our_names("text_encoder_2", model)
    table = keys.clip_table_to_open_clip(names)
    numbered = {ours: torch.full((width, width), float(i)) for i, ours in enumerate(names)}
    stored: dict[str, Any] = {}
    for ours, place in table.items():
        stored.setdefault(place.name, {})[place.third or 0] = numbered[ours]
    prefix = "conditioner.embedders.1.model."
    whole = {prefix + name: torch.cat([thirds[i] for i in sorted(thirds)]) for name, thirds in stored.items()}
    whole[f"{prefix}text_projection"] = whole[f"{prefix}text_projection"][:width]

    class Stub(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"hidden_size": width, "projection_dim": width})()

    read = convert_open_clip_checkpoint(Stub(), whole, prefix=prefix)
    read.pop("text_model.embeddings.position_ids", None)
    assert read.keys() == numbered.keys()
    for ours, value in numbered.items():
        assert torch.equal(read[ours].flatten()[:width], value.flatten()[:width]), ours


def test_names_without_meaning_are_left_over() -> None:
    known = {"input_blocks.0.0.weight", "time_embed.0.weight"}
    found = keys.unet_table_from_ldm(
        known | {"input_blocks.x.0.weight", "input_blocks", "", "output_blocks.9999999.0.y"}
    )
    assert {stored.name for stored in found.values()} == known


@pytest.mark.parametrize(
    "changes",
    [
        # Segmind's SSD-1B: fewer transformer layers, other ones on the way up, one resnet in the middle.
        {
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        {"layers_per_block": 1},
        {"mid_block_type": None, "layers_per_block": 1},
    ],
)
def test_pruned_unets_are_detected_from_their_tensors(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(**(UNETS["sdxl"] | changes))
    names = our_names("unet", model)
    table = keys.unet_table_from_ldm({stored.name for stored in keys.unet_table_to_ldm(names).values()})
    assert table.keys() == names.keys()
    shapes = {ours: tuple(names[ours].shape) for ours in table}
    with torch.device("meta"):
        again = UNet2DConditionModel(**unet_config(shapes, SDXL, pooled_width=1280, sample_size=128))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in names.items()}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_configurations_are_read_off_shapes(name: str) -> None:
    model = published(name)["unet"]
    shapes = {ours: tuple(tensor.shape) for ours, tensor in our_names("unet", model).items()}
    found = unet_config(shapes, FAMILIES[name], pooled_width=1280 if name == "sdxl" else None, sample_size=64)
    with torch.device("meta"):
        again = UNet2DConditionModel(**found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}

    def heads(unet: nn.Module) -> list[int]:
        return [module.heads for key, module in unet.named_modules() if key.endswith(("attn1", "attn2"))]

    assert heads(again) == heads(model)
    assert again.config["norm_num_groups"] == 32
