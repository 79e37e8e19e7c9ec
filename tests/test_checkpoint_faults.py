"""Checkpoints that are damaged or of another kind are refused in one line that names what they are."""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdlora
from sdlora.base.checkpoint import find_base
from sdlora.base.detect import detect_checkpoint
from sdlora.errors import BaseModelError
from tests.tiny import opened, tiny_ldm_tensors, tiny_pipeline, write_tiny_ldm


def test_damaged_pickles_give_one_line(tmp_path: Path) -> None:
    torch.save({"state_dict": tiny_ldm_tensors(tiny_pipeline("sd1"), "sd1")}, tmp_path / "whole.ckpt")
    good, rng = (tmp_path / "whole.ckpt").read_bytes(), random.Random(0)
    torch.save([1, 2], tmp_path / "list.ckpt")
    variants = [good[: rng.randrange(2, len(good))] for _ in range(10)]
    variants += [b"PK", b"\x80\x02", b"\x80\x02" + rng.randbytes(100), (tmp_path / "list.ckpt").read_bytes()]
    for data in variants:
        (tmp_path / "x.ckpt").write_bytes(data)
        with pytest.raises(BaseModelError, match=r"x\.ckpt") as caught:
            detect_checkpoint(tmp_path / "x.ckpt")
        assert len(caught.value.problems) == 1
        assert "\n" not in caught.value.problems[0]


def changed(tensors: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    unet, more = "model.diffusion_model.", torch.zeros(4, 4)
    if what.startswith("inputs"):
        channels = int(what.split()[1])
        return tensors | {f"{unet}input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3)}
    names = {
        "lcm": f"{unet}time_embed.cond_proj.weight",
        "edm": "edm_mean",
        "motion": f"{unet}input_blocks.1.motion_modules.0.x",
        "unclip": f"{unet}label_emb.0.0.weight",
    }
    if what in names:
        return tensors | {names[what]: more}
    other = {
        "sd3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "flux": "double_blocks.0.img_attn.qkv.weight",
        "controlnet": "control_model.input_hint_block.0.weight",
        "lora": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "embedding": "emb_params",
        "unknown": "what.is.this",
    }
    return {other[what]: more}


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("inputs 9", "is an inpainting model"),
        ("inputs 8", "is an instruct-pix2pix model"),
        ("inputs 5", "is a depth-to-image model"),
        ("inputs 7", "is an upscaler"),
        ("inputs 6", "is a UNet with 6 input channels"),
        ("lcm", "is an LCM distillation"),
        ("edm", "was trained on an EDM noise schedule"),
        ("motion", "makes videos"),
        ("unclip", "is unCLIP"),
        ("sd3", "is a Stable Diffusion 3 checkpoint"),
        ("flux", "is a Flux checkpoint"),
        ("controlnet", "is a ControlNet"),
        ("lora", "is a LoRA, not a base checkpoint; use it with --lora"),
        ("embedding", "is a textual-inversion embedding"),
        ("unknown", "is not a checkpoint that sdlora knows"),
    ],
)
def test_what_cannot_be_used_is_named(what: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(changed(tiny_ldm_tensors(tiny_pipeline("sd1"), "sd1"), what), file)
    with pytest.raises(BaseModelError, match=sentence) as caught:
        find_base(str(file))
    assert len(caught.value.problems) == 1
    if what != "lora":
        report = sdlora.inspect(file)
        assert (report.kind, report.family) == (what if what in ("controlnet", "embedding") else "checkpoint", None)
        assert sentence in report.problems[0]


def test_the_refiner_is_refused(tmp_path: Path) -> None:
    tensors = tiny_ldm_tensors(tiny_pipeline("sdxl"), "sdxl")
    renamed = {
        k.replace("conditioner.embedders.1.", "conditioner.embedders.0."): v
        for k, v in tensors.items()
        if not k.startswith("conditioner.embedders.0.")
    }
    save_file(renamed, tmp_path / "x.safetensors")
    with pytest.raises(BaseModelError, match="is the SDXL refiner"):
        find_base(str(tmp_path / "x.safetensors"))


def damaged_headers(good: bytes, count: int) -> list[bytes]:
    """Variants of a safetensors file, each broken in one of many ways."""
    rng = random.Random(0)
    (length,) = struct.unpack("<Q", good[:8])
    table, payload = json.loads(good[8 : 8 + length]), good[8 + length :]
    names = [name for name in table if name != "__metadata__"]

    def file(text: bytes, declared: int | None = None) -> bytes:
        return struct.pack("<Q", len(text) if declared is None else declared) + text + payload

    def entry_changed(change: Any) -> bytes:
        copy = json.loads(json.dumps(table))
        copy[rng.choice(names)].update(change(copy))
        return file(json.dumps(copy).encode())

    def cut() -> bytes:
        return good[: rng.randrange(len(good))]

    def flipped() -> bytes:
        data = bytearray(good)
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        return bytes(data)

    def twice() -> bytes:
        name = rng.choice(names)
        return file(json.dumps(table)[:-1].encode() + f',"{name}":{json.dumps(table[name])}}}'.encode())

    values = [float("nan"), None, -1, 1e30, "0", [], {}, 2**70, True]
    ways = [
        cut,
        flipped,
        twice,
        lambda: file(json.dumps(table).encode(), declared=rng.choice([0, 1, 2**40, 2**63, 2**64 - 1, length - 1])),
        lambda: file(rng.randbytes(rng.randrange(200))),
        lambda: file(b"[" * rng.randrange(1, 100_000)),
        lambda: entry_changed(lambda copy: {"data_offsets": [0, rng.randrange(1, 10**9)]}),
        lambda: entry_changed(lambda copy: {"data_offsets": copy[rng.choice(names)]["data_offsets"] + [1]}),
        lambda: entry_changed(lambda copy: {"dtype": rng.choice(["F16", "I64", "F3", 5, None, []])}),
        lambda: entry_changed(lambda copy: {"shape": rng.choice([[], [1], [10**9, 10**9], [0], [-1, -1], "x"])}),
        lambda: entry_changed(lambda copy: {"shape": [rng.choice(values)]}),
        lambda: entry_changed(lambda copy: {"data_offsets": [rng.choice(values), rng.choice(values)]}),
        lambda: file(json.dumps(table | {"__metadata__": rng.choice(values)}).encode()),
        lambda: file(json.dumps({name: table[name] for name in rng.sample(names, len(names) - 1)}).encode()),
    ]
    return [rng.choice(ways)() for _ in range(count)]


def test_damaged_headers_give_one_line_each(tmp_path: Path) -> None:
    small = {k: v[:0] if v.ndim > 1 and v.numel() > 4096 else v for k, v in load_small(tmp_path).items()}
    save_file(small, tmp_path / "small.safetensors", metadata={"a": "b"})
    good = (tmp_path / "small.safetensors").read_bytes()
    outcomes = []
    for number, data in enumerate(damaged_headers(good, 1000)):
        (tmp_path / "x.safetensors").write_bytes(data)
        if number < 200:
            tracemalloc.start()
        began = time.perf_counter()
        try:
            detect_checkpoint(tmp_path / "x.safetensors")
            outcomes.append(True)
        except BaseModelError as error:
            assert len(error.problems) == 1
            assert "\n" not in error.problems[0]
            assert len(error.problems[0]) < 1000
            assert "x.safetensors" in error.problems[0]
            outcomes.append(False)
        assert time.perf_counter() - began < 2
        if tracemalloc.is_tracing():
            # A parsed header is objects, several times its text; what it claims to describe must not count.
            assert tracemalloc.get_traced_memory()[1] < 30 * len(data) + 2_000_000
            tracemalloc.stop()
    # A flipped bit in a name, or a dtype of the same width, leaves a file that can be read.
    assert sum(outcomes) < 100


def load_small(folder: Path) -> dict[str, torch.Tensor]:
    write_tiny_ldm(folder / "whole.safetensors", "sdxl")
    return load_file(folder / "whole.safetensors")


def test_shapes_that_surprise_are_refused_in_one_line(tmp_path: Path) -> None:
    tensors = tiny_ldm_tensors(tiny_pipeline("sdxl"), "sdxl")
    rng = random.Random(1)
    for name in rng.sample(sorted(tensors), 25):
        if name.startswith(("model_ema", "alphas")) or name.endswith("logit_scale"):
            continue
        for replacement in (torch.tensor(1.0), torch.zeros(0), torch.zeros(3, 5), torch.zeros(2, 3, 1, 1)):
            save_file(tensors | {name: replacement}, tmp_path / "x.safetensors")
            with pytest.raises(BaseModelError) as caught:
                opened(tmp_path / "x.safetensors")
            assert len(caught.value.problems) == 1, name


def test_a_checkpoint_of_nan_says_so(tmp_path: Path) -> None:
    tensors = tiny_ldm_tensors(tiny_pipeline("sd1"), "sd1")
    broken = tensors | {"model.diffusion_model.out.2.weight": torch.full((4, 32, 3, 3), float("nan"))}
    save_file(broken, tmp_path / "x.safetensors")
    with pytest.raises(BaseModelError, match="the UNet produced NaN or Inf"):
        sdlora.generate("x", base=str(tmp_path / "x.safetensors"), size=(64, 64), steps=1)
