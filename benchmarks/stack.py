"""LoRAs on a pipeline: from files to ready, one weight changed, and a step with eight, against diffusers' own loader.

    python -m benchmarks.stack [--base mini | tiny | sd1 | sdxl] [--dtype bfloat16] [--rank 32] [--rounds 5] [--json]

Both sides work on the same pipeline of diffusers, in turn, and read the same files in kohya's format: every linear layer of
the UNet's attention blocks, as kohya's trainer has it by default.

- ``ready``: three files. Ours: ``sdlora.apply``. diffusers: ``load_lora_weights`` of each, ``set_adapters``, ``fuse_lora``,
  after which both compute a step as fast as the bare base.
- ``one weight``: another weight for one of the three. Ours: ``sdlora.apply`` again. diffusers: ``unfuse_lora``,
  ``set_adapters``, ``fuse_lora``.
- ``step``: the UNet's forward with eight LoRAs over the bare one. Ours: on the weights. diffusers: eight adapters as
  ``set_adapters`` leaves them, which is what changes a weight without fusing again.

``sd1`` and ``sdxl`` are models of the published sizes with random weights; ``tiny`` is a few layers of SDXL's form.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils.logging import set_verbosity_error

import sdlora
from benchmarks.kohya_modules import KOHYA_DEFAULT
from benchmarks.random_weights import fill_randomly
from benchmarks.turns import conditions, in_turn, median, print_results, ratio, seconds
from sdlora.base.checkpoint import MINI_FOLDER
from sdlora.families import FAMILIES, Family
from sdlora.formats.lora_writer import write_lora
from sdlora.lora.low_rank import LowRank
from tests.published import published
from tests.tiny import tiny_pipeline

BASES = ("tiny", "mini", "sd1", "sdxl")
STACKED, IN_STEP = 3, 8
WEIGHT, OTHER_WEIGHT = 0.8, 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """A pipeline and LoRA files that fit it."""

    pipe: Any
    files: Sequence[Path]


def open_pipeline(name: str, dtype: torch.dtype) -> tuple[Any, Family]:
    """The pipeline of a base, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "tiny":
        return tiny_pipeline("sdxl").to(device, dtype), FAMILIES["sdxl"]
    if name == "mini":
        pipe = StableDiffusionPipeline.from_pretrained(MINI_FOLDER, torch_dtype=dtype, safety_checker=None)
        return pipe.to(device), FAMILIES["sd1"]
    unet = published(name)["unet"].to(dtype).to_empty(device=device).requires_grad_(False).eval()
    fill_randomly(unet)
    absent: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler"))
    if name == "sdxl":
        absent |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        return StableDiffusionXLPipeline(unet=unet, **absent), FAMILIES["sdxl"]
    return StableDiffusionPipeline(unet=unet, **absent, safety_checker=None, feature_extractor=None), FAMILIES["sd1"]


def write_files(folder: Path, unet: torch.nn.Module, family: Family, *, rank: int, count: int) -> list[Path]:
    """LoRA files in float16 whose change is about 1 % of a weight."""
    modules = {f"unet.{name}": module.weight for name, module in unet.named_modules() if hasattr(module, "weight")}
    shapes = {name: tuple(weight.shape) for name, weight in modules.items() if isinstance(weight, torch.Tensor)}
    files = []
    for number in range(count):
        changes = {}
        for name, (out, inner, *kernel) in ((n, s) for n, s in shapes.items() if re.search(KOHYA_DEFAULT, n)):
            down, up = torch.randn(rank, inner, *kernel), torch.randn(out, rank, *kernel)
            changes[name] = LowRank(down=down * inner**-0.5, up=up * 0.01 * rank**-0.5, alpha=float(rank))
        files.append(folder / f"style{number}.safetensors")
        write_lora(files[-1], changes, {}, dtype=torch.float16, family=family, base_modules=shapes)
    return files


class Ours:
    """``sdlora.apply``."""

    def __init__(self, setting: Setting):
        self._pipe, self._files = setting.pipe, setting.files

    def load(self, count: int) -> None:
        sdlora.apply(self._pipe, [f"{file}:{WEIGHT}" for file in self._files[:count]])

    def make_ready(self) -> None:
        self.load(STACKED)

    def change(self, weight: float) -> None:
        others = [f"{file}:{WEIGHT}" for file in self._files[1:STACKED]]
        sdlora.apply(self._pipe, [f"{self._files[0]}:{weight}", *others])

    def remove(self) -> None:
        sdlora.restore(self._pipe)


class Diffusers:
    """diffusers' loader with peft."""

    def __init__(self, setting: Setting):
        self._pipe, self._files, self._fused = setting.pipe, setting.files, False
        self._names = [file.stem for file in setting.files]

    def load(self, count: int) -> None:
        for file in self._files[:count]:
            self._pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
        self._pipe.set_adapters(self._names[:count], [WEIGHT] * count)

    def make_ready(self) -> None:
        self.load(STACKED)
        self._fuse()

    def _fuse(self) -> None:
        self._pipe.fuse_lora(components=["unet"], adapter_names=self._names[:STACKED])
        self._fused = True

    def change(self, weight: float) -> None:
        self._pipe.unfuse_lora(components=["unet"])
        self._pipe.set_adapters(self._names[:STACKED], [weight, *[WEIGHT] * (STACKED - 1)])
        self._fuse()

    def remove(self) -> None:
        if self._fused:
            self._pipe.unfuse_lora(components=["unet"])
            self._fused = False
        self._pipe.unload_lora_weights()


Side = Ours | Diffusers


def sides_of(setting: Setting) -> dict[str, Side]:
    return {"sdlora": Ours(setting), "diffusers": Diffusers(setting)}


def loading_times(setting: Setting, rounds: int) -> dict[str, dict[str, list[float]]]:
    """What is measured -> side -> seconds."""
    changes: dict[str, list[float]] = {}

    def measured(name: str, side: Side) -> float:
        ready = seconds(side.make_ready)
        changes.setdefault(name, []).append(seconds(lambda: side.change(OTHER_WEIGHT)))
        side.remove()
        return ready

    ready = in_turn({name: partial(measured, name, side) for name, side in sides_of(setting).items()}, rounds)
    return {"ready": ready, "one weight": {name: took[-rounds:] for name, took in changes.items()}}


@torch.no_grad()
def step_times(setting: Setting, rounds: int, side_in_pixels: int) -> dict[str, list[float]]:
    """Seconds of the UNet's forward: bare, and with all files on it."""
    unet = setting.pipe.unet
    config, place = unet.config, {"device": unet.device, "dtype": unet.dtype}
    latents = torch.randn(1, config.in_channels, side_in_pixels // 8, side_in_pixels // 8, **place)
    text = torch.randn(1, 77, config.cross_attention_dim, **place)
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(1, pooled, **place), "time_ids": torch.zeros(1, 6, **place)}

    def forward() -> None:
        unet(latents, 500, text, added_cond_kwargs=added)

    def measured(side: Side | None) -> float:
        if side is not None:
            side.load(IN_STEP)
        forward()
        took = min(seconds(forward) for _ in range(2))
        if side is not None:
            side.remove()
        return took

    return in_turn(
        {name: partial(measured, side) for name, side in [("bare", None), *sides_of(setting).items()]}, rounds
    )


def compare(
    name: str, folder: Path, *, dtype: torch.dtype, rank: int, rounds: int, pixels: int
) -> list[dict[str, Any]]:
    """The table."""
    torch.manual_seed(0)
    set_verbosity_error()
    pipe, family = open_pipeline(name, dtype)
    setting = Setting(pipe=pipe, files=write_files(folder, pipe.unet, family, rank=rank, count=IN_STEP))
    rows: list[dict[str, Any]] = [
        {
            "what": what,
            "sdlora, s": median(times["sdlora"]),
            "diffusers, s": median(times["diffusers"]),
            "diffusers / sdlora": ratio(times, "diffusers", "sdlora"),
        }
        for what, times in loading_times(setting, rounds).items()
    ]
    steps = step_times(setting, rounds, pixels)
    rows.append(
        {
            "what": f"step with {IN_STEP}",
            "sdlora, s": median(steps["sdlora"]),
            "diffusers, s": median(steps["diffusers"]),
            "diffusers / sdlora": ratio(steps, "diffusers", "sdlora"),
            "sdlora / bare": ratio(steps, "sdlora", "bare"),
        }
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="mini")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pixels", type=int, default=256, help="side of the image of a step")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    stated = {name: value for name, value in vars(options).items() if name != "json"}
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(
            options.base,
            Path(folder),
            dtype=getattr(torch, options.dtype),
            rank=options.rank,
            rounds=options.rounds,
            pixels=options.pixels,
        )
    print_results(conditions(**stated), rows, as_json=options.json)


if __name__ == "__main__":
    main()
