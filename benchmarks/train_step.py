"""Time of a training step: ours, the same work with peft, and the floor, in one run.

    python benchmarks/train_step.py [--base mini] [--precision auto] [--rounds 12]

The floor is what no LoRA trainer can go below while it trains through the whole model: the frozen text encoder and
UNet, forward and backward to their inputs (token embeddings and latents), with no LoRA and no optimizer. ``peft`` is
``inject_adapter_in_model`` on copies of the same modules with the same targets and rank, the same min-SNR weighted loss,
``clip_grad_norm_`` and fused AdamW. The three take turns, a few steps each; ratios are taken round by round.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from sdlora.base.base import Base
from sdlora.base.conditioning import Framing, time_ids
from sdlora.base.encode import encode_prompts
from sdlora.base.load import load_base
from sdlora.base.precision import choose_precision
from sdlora.base.tokens import PromptTokens, plain, tokenize
from sdlora.config.loading import load_config
from sdlora.config.sections import ObjectiveSection
from sdlora.lora.adapter import ATTENTION
from sdlora.progress import Silence
from sdlora.training.loss import denoising_loss
from sdlora.training.plan import RunPlan, plan_config
from sdlora.training.session import open_session

STEPS_A_TURN = 4


def our_step(base: Base, plan: RunPlan) -> Callable[[], None]:
    session, counter = open_session(plan, base, Accelerator(), Silence()), itertools.count()
    session.adapter.attach(base.modules())

    def step() -> None:
        session.step(next(counter))

    return step


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    latents: torch.Tensor
    time_ids: torch.Tensor
    prompts: list[PromptTokens]

    def loss(self, base: Base) -> torch.Tensor:
        noise = torch.randn_like(self.latents)
        timesteps = torch.randint(0, 1000, (len(noise),), device=base.device)
        conditioning = encode_prompts(base, self.prompts)
        return denoising_loss(
            base, self.latents, noise, timesteps, conditioning, self.time_ids, objective=ObjectiveSection()
        ).mean()


def inputs(base: Base, batch: int) -> Inputs:
    resolution = base.checkpoint.resolution
    side = resolution // base.checkpoint.latent_factor
    return Inputs(
        latents=torch.randn(batch, 4, side, side, device=base.device),
        time_ids=time_ids([Framing.whole(resolution, resolution)] * batch).to(base.device),
        prompts=[tokenize(base, plain("blupaper, a red apple"))] * batch,
    )


def peft_step(base: Base, batch: int, rank: int) -> Callable[[], None]:
    from peft import LoraConfig, inject_adapter_in_model

    options = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION), init_lora_weights="gaussian")
    models = [base.unet, *(encoder.model for encoder in base.text_encoders)]
    for model in models:
        inject_adapter_in_model(options, model)
    trained = [p for m in models for n, p in m.named_parameters() if "lora_" in n]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    given = inputs(base, batch)

    def step() -> None:
        given.loss(base).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor_step(base: Base, batch: int) -> Callable[[], None]:
    given = inputs(base, batch)
    for encoder in base.text_encoders:
        embeddings = encoder.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, given, output: output.requires_grad_())

    def step() -> None:
        given.latents.requires_grad_()
        given.loss(base).backward()
        given.latents.grad = None

    return step


def turn(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS_A_TURN):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS_A_TURN


def compare(base_path: str, precision: str, batch: int, rank: int, rounds: int) -> dict[str, object]:
    values = [
        f"base.path={json.dumps(base_path)}",
        f"train.batch_size={batch}",
        f"lora.rank={rank}",
        "lora.targets=attention",
    ]
    plan = plan_config(load_config("configs/quickstart-blueprint.toml", values))
    device = Accelerator().device
    dtype = choose_precision(precision, device, unet_parameters=plan.base.unet_parameters)
    pristine = load_base(plan.base, device=device, dtype=dtype)
    steps = {
        "ours": our_step(copy.deepcopy(pristine), plan),
        "peft": peft_step(copy.deepcopy(pristine), batch, rank),
        "floor": floor_step(copy.deepcopy(pristine), batch),
    }
    for step in steps.values():
        turn(step, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(turn(step, device))

    def ratio(one: str, other: str) -> list[float]:
        ratios = sorted(a / b for a, b in zip(times[one], times[other], strict=True))
        return [round(r, 3) for r in (statistics.median(ratios), ratios[0], ratios[-1])]

    return {
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: round(1000 * statistics.median(values), 1) for name, values in times.items()},
        "ours / floor": ratio("ours", "floor"),
        "ours / peft": ratio("ours", "peft"),
        "peft / floor": ratio("peft", "floor"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}; ratios are median [least, most] of {arguments.rounds} rounds")
    for batch in arguments.batches:
        result = compare(arguments.base, arguments.precision, batch, arguments.rank, arguments.rounds)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
