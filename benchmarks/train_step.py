"""Time of a training step: ours, the same work with peft, the diffusers example's recipe, and the floor, in one run.

    python -m benchmarks.train_step [--base mini | sd1 | sdxl | FILE] [--resolution 512] [--batches 1 4] [--json]

The floor is what no LoRA trainer can go below while it trains through the whole model: the frozen UNet (and the text
encoders, where they are trained), forward and backward to their inputs, with no LoRA and no optimizer. ``compiled
floor`` and ``compiled ours`` (``train.compile``) have the UNet's transformer blocks compiled. ``peft`` is
``inject_adapter_in_model`` on copies of the same modules with the same targets and rank, the same min-SNR weighted
loss, ``clip_grad_norm_`` and fused AdamW. ``example`` is the recipe of diffusers' ``train_text_to_image_lora.py``
rebuilt: autocast, float32 LoRA layers of peft, each image through the VAE and each caption through the text encoders
in every step, plain mean squared error, and the loss read back. The sides take turns, a few steps each; ratios are
taken round by round.

``sd1`` and ``sdxl`` are models of the published sizes with random weights, made in the device's memory. Their text
encoders stay frozen: ours and the floors then start from encoded captions, as a run does.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import copy
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.random_weights import fill_base_randomly
from benchmarks.turns import conditions, in_turn, median, print_results, ratio, seconds, significant
from sdlora.base.base import Base
from sdlora.base.compiling import compile_blocks
from sdlora.base.conditioning import Conditioning, Framing, time_ids
from sdlora.base.encode import encode_prompts
from sdlora.base.load import load_base
from sdlora.base.precision import choose_precision
from sdlora.base.tokens import PromptTokens, plain, tokenize
from sdlora.config.loading import load_config
from sdlora.config.sections import ObjectiveSection
from sdlora.lora.targets import ATTENTION
from sdlora.progress import Silence
from sdlora.training.loss import denoising_loss
from sdlora.training.plan import RunPlan, plan_config
from sdlora.training.session import open_session
from tests.real_size import write_hollow_checkpoint

STEPS_A_TURN = 4
SIDES = ("ours", "compiled ours", "peft", "example", "floor", "compiled floor")
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What all sides share."""

    base: Base
    """Pristine: each side works on a copy."""
    plan: RunPlan
    batch: int
    rank: int
    trains_text: bool

    @property
    def resolution(self) -> int:
        stated = self.plan.config.data.resolution
        return stated if isinstance(stated, int) else self.base.checkpoint.resolution


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    latents: torch.Tensor
    time_ids: torch.Tensor
    prompts: list[PromptTokens]
    conditioning: Conditioning | None
    """That of the prompts where the text encoders are frozen."""

    @classmethod
    def of(cls, setting: Setting, base: Base) -> Inputs:
        side = setting.resolution // base.checkpoint.latent_factor
        prompts = [tokenize(base, plain("blupaper, a red apple"))] * setting.batch
        with torch.no_grad():
            conditioning = None if setting.trains_text else encode_prompts(base, prompts)
        return cls(
            latents=torch.randn(setting.batch, 4, side, side, device=base.device),
            time_ids=time_ids([Framing.whole(setting.resolution, setting.resolution)] * setting.batch).to(base.device),
            prompts=prompts,
            conditioning=conditioning,
        )

    def loss(self, base: Base) -> torch.Tensor:
        noise = torch.randn_like(self.latents)
        timesteps = torch.randint(0, 1000, (len(noise),), device=base.device)
        conditioning = self.conditioning or encode_prompts(base, self.prompts)
        return denoising_loss(
            base, self.latents, noise, timesteps, conditioning, self.time_ids, objective=ObjectiveSection()
        ).mean()


def copied(base: Base) -> Base:
    """Modules of their own, over the same frozen tensors: a copy of each would not fit beside the others."""
    models = (base.unet, base.vae, *base.encoder_models())
    return copy.deepcopy(base, {id(tensor): tensor for model in models for tensor in model.parameters()})


def our_step(setting: Setting, *, compiled: bool = False) -> Step:
    base, counter = copied(setting.base), itertools.count()
    session = open_session(setting.plan, base, Accelerator(), Silence())
    session.adapter.attach(base.modules())
    if compiled:
        compile_blocks(base.unet)

    def step() -> None:
        session.step(next(counter))

    return step


def with_peft(setting: Setting, base: Base) -> list[torch.nn.Parameter]:
    """Put peft's layers into ``base``; returns their parameters, float32."""
    from peft import LoraConfig, inject_adapter_in_model

    options = LoraConfig(
        r=setting.rank, lora_alpha=setting.rank, target_modules=list(ATTENTION), init_lora_weights="gaussian"
    )
    encoders = [encoder.model for encoder in base.text_encoders] if setting.trains_text else []
    models = [base.unet, *encoders]
    for model in models:
        inject_adapter_in_model(options, model)
    trained = [p for m in models for n, p in m.named_parameters() if "lora_" in n]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def peft_step(setting: Setting) -> Step:
    base = copied(setting.base)
    trained = with_peft(setting, base)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    given = Inputs.of(setting, base)

    def step() -> None:
        given.loss(base).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def example_step(setting: Setting) -> Step:
    base = copied(setting.base)
    trained = with_peft(setting, base)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    given, size = Inputs.of(setting, base), setting.resolution
    pixels = torch.randn(setting.batch, 3, size, size)
    alphas = torch.linspace(0.999, 0.005, 1000, device=base.device)
    accelerator = Accelerator()

    def step() -> None:
        with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
            images = pixels.to(base.device, base.vae.dtype)
            latents = base.vae.encode(images).latent_dist.sample() * base.checkpoint.latent_scale
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(noise),), device=base.device)
            kept = alphas[timesteps][:, None, None, None]
            noisy = (kept.sqrt() * latents + (1 - kept).sqrt() * noise).to(base.dtype)
            conditioning = encode_prompts(base, given.prompts)
            predicted = base.predict(noisy, timesteps, conditioning, given.time_ids)
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        accelerator.gather(loss.repeat(setting.batch)).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        loss.detach().item()

    return step


def floor_step(setting: Setting, *, compiled: bool = False) -> Step:
    base = copied(setting.base)
    given = Inputs.of(setting, base)
    if compiled:
        compile_blocks(base.unet)
    for encoder in base.text_encoders:
        embeddings = encoder.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, given, output: output.requires_grad_())

    def step() -> None:
        given.latents.requires_grad_()
        given.loss(base).backward()
        given.latents.grad = None

    return step


def step_of(side: str, setting: Setting) -> Step:
    compiled = side.startswith("compiled")
    if side.endswith("ours"):
        return our_step(setting, compiled=compiled)
    if side.endswith("floor"):
        return floor_step(setting, compiled=compiled)
    return {"peft": peft_step, "example": example_step}[side](setting)


def turn(step: Step) -> float:
    """Seconds of a step, on average over a few."""

    def steps() -> None:
        for _ in range(STEPS_A_TURN):
            step()

    return seconds(steps) / STEPS_A_TURN


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a setting is made of."""
    parser.add_argument("--base", default="mini")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", action="store_true")


def open_setting(arguments: argparse.Namespace, folder: Path, batch: int) -> Setting:
    """The base in the device's memory, and the plan of a run on the sample images."""
    random = arguments.base in ("sd1", "sdxl")
    path = write_hollow_checkpoint(folder / "hollow.safetensors", arguments.base) if random else arguments.base
    values = [
        f"base.path={json.dumps(str(path))}",
        f"train.batch_size={batch}",
        f"lora.rank={arguments.rank}",
        "lora.targets=attention",
        *(["optimizer.text_encoder_learning_rate=0"] if random else []),
        *([f"data.resolution={arguments.resolution}"] if arguments.resolution else []),
        # No trial of memory, no compute twice: all sides compute the whole batch once.
        "train.gradient_checkpointing=false",
        f"train.micro_batch={batch}",
        f"cache.folder={json.dumps(str(folder / 'cache'))}",
    ]
    plan = plan_config(load_config("configs/quickstart-blueprint.toml", values))
    device = Accelerator().device
    dtype = choose_precision(arguments.precision, device, unet_parameters=plan.base.unet_parameters)
    base = load_base(plan.base, device=device, dtype=dtype)
    if random:
        fill_base_randomly(base)
    return Setting(base=base, plan=plan, batch=batch, rank=arguments.rank, trains_text=not random)


def compare(setting: Setting, sides: list[str], rounds: int) -> dict[str, Any]:
    """A row of the table."""
    steps, peaks = {}, {}
    for side in sides:
        step = steps[side] = step_of(side, setting)
        turn(step)
        if setting.base.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            turn(step)
            peaks[side] = significant((torch.cuda.max_memory_allocated() - before) / 1e9)
    times = in_turn({side: partial(turn, step) for side, step in steps.items()}, rounds, warmups=0)
    others = [side for side in sides if side != "ours" and "ours" in sides]
    return {
        "batch": setting.batch,
        "resolution": setting.resolution,
        "dtype": str(setting.base.dtype).removeprefix("torch."),
        **{f"{side}, ms": significant(1000 * median(values)) for side, values in times.items()},
        **{f"ours / {other}": ratio(times, "ours", other) for other in others},
        **{f"{side}, GB above the weights": peak for side, peak in peaks.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "peft", "example", "floor"])
    arguments = parser.parse_args()
    stated = conditions(base=arguments.base, rank=arguments.rank, rounds=arguments.rounds)
    rows = []
    for batch in arguments.batches:
        with tempfile.TemporaryDirectory() as folder:
            setting = open_setting(arguments, Path(folder), batch)
            rows.append(compare(setting, arguments.sides, arguments.rounds))
    print_results(stated, rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
