"""``inspect`` of files that are neither a LoRA nor a base: it names what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sdlora.cli import app

OTHERS = {
    "embedding": (["emb_params"], "embedding", "textual-inversion embedding"),
    "embedding of SDXL": (["clip_l", "clip_g"], "embedding", "textual-inversion embedding"),
    "flux": (["double_blocks.0.img_attn.qkv.weight"], "checkpoint", "Flux checkpoint"),
    "sd3": (["model.diffusion_model.joint_blocks.0.x"], "checkpoint", "Stable Diffusion 3 checkpoint"),
    "pixart": (["adaln_single.linear.weight"], "checkpoint", "PixArt checkpoint"),
    "controlnet": (["control_model.input_hint_block.0.weight"], "controlnet", "ControlNet"),
    "controlnet of diffusers": (
        ["conv_in.weight", "down_blocks.0.resnets.0.norm1.weight", "controlnet_cond_embedding.conv_in.weight"],
        "controlnet",
        "ControlNet",
    ),
    "motion": (["down_blocks.0.motion_modules.0.x"], "motion-module", "motion module"),
    "vae": (["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.up.0.block.0.norm1.weight"], "vae", "VAE"),
    "vae with a prefix": (["first_stage_model.decoder.conv_in.weight"], "vae", "VAE"),
    "clip": (["text_model.final_layer_norm.weight"], "text-encoder", "text encoder"),
    "t5": (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "text-encoder", "T5 text encoder"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_a_file_is_comes_first(what: str, tmp_path: Path) -> None:
    names, kind, title = OTHERS[what]
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "x.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "x.safetensors")])
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[0].partition(", ")[0] == f"x.safetensors: {title}"
    assert "None" not in shown.stdout
    found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "x.safetensors"), "--json"]).stdout)
    assert (found["kind"], found["title"], found["family"]) == (kind, title, None)
    assert found["problems"]


def test_an_embedding_of_diffusers_is_known_by_its_width(tmp_path: Path) -> None:
    for width, kind in ((768, "embedding"), (5, "checkpoint")):
        save_file({"<zorb>": torch.zeros(2, width)}, tmp_path / "x.safetensors")
        found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "x.safetensors"), "--json"]).stdout)
        assert found["kind"] == kind
