"""Train the UNet of the miniature base on cached latents and cached caption embeddings."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from .budget import Budget, late_descent_rate
from .latents import Latents
from .sizes import Sizes, lowered, trains_in_bfloat16
from .text import TOKENS, WIDTH, token_tables

LEARNING_RATE, WARMUP = 8e-4, 300
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
SEED = 2


def alphas_cumprod() -> Tensor:
    """Scaled-linear betas of Stable Diffusion 1.x, shifted and scaled to end in pure noise, (1000,) float32.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    roots = torch.cumprod(1 - betas, 0).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return roots.square().float()


def new_unet() -> UNet2DConditionModel:
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 192, 224),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=32,
    )


class CaptionEmbeddings:
    """Embeddings of every caption by the frozen text encoder, computed once."""

    @torch.no_grad()
    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, latents: Latents, device: torch.device):
        encoder = copy.deepcopy(encoder).to(device)
        tables = token_tables(tokenizer, latents)
        distinct: dict[bytes, int] = {}
        rows: list[Tensor] = []
        self._numbers: list[list[int]] = []
        for table in tables:
            for row in table:
                if distinct.setdefault(row.numpy().tobytes(), len(rows)) == len(rows):
                    rows.append(row)
            self._numbers.append([distinct[row.numpy().tobytes()] for row in table])
        self._empty = torch.tensor(tokenizer("", padding="max_length").input_ids)[None]
        dtype = torch.bfloat16 if trains_in_bfloat16(device) else torch.float32
        stored = torch.empty(len(rows) + 1, TOKENS, WIDTH, dtype=dtype, device=device)
        with lowered(device):
            for start in range(0, len(rows), 128):
                part = torch.stack(rows[start : start + 128]).to(device)
                stored[start : start + len(part)] = encoder(part).last_hidden_state
            stored[-1] = encoder(self._empty.to(device)).last_hidden_state[0]
        self._stored = stored

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """(b, 77, width): a random caption of each image in ``rows``, or sometimes the empty one."""
        chosen = [
            -1 if rng.random() < CAPTION_DROPOUT else self._numbers[row][int(rng.integers(len(self._numbers[row])))]
            for row in rows
        ]
        return self._stored[torch.tensor(chosen, device=self._stored.device)]


def denoising_loss(
    unet: UNet2DConditionModel, context: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor
) -> Tensor:
    """Mean squared error of v (Salimans & Ho 2022, section 4), every noise level with the same weight: another would
    leave the last one, pure noise, without any."""
    a = alphas[timesteps][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    predicted = unet(noisy, timesteps, context).sample.float()
    return (predicted - (a.sqrt() * noise - (1 - a).sqrt() * latents)).square().mean()


class OneDevice:
    """Passes the whole batch through the UNet."""

    def __init__(self, unet: UNet2DConditionModel):
        self._unet, self._alphas = unet, alphas_cumprod().to(unet.device)

    def gradients(self, context: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Write the gradients of the batch's mean loss to the UNet; returns that loss, ()."""
        with lowered(context.device):
            loss = denoising_loss(self._unet, context, latents, noise, timesteps, self._alphas)
        loss.backward()
        return loss.detach()


class Workers:
    """Threads that each pass a share of the batch through a replica of the UNet, on one core each.

    The replicas share the UNet's weights and have separate gradients. On small tensors this is one and a half times as
    fast as splitting every operation over the cores.
    """

    def __init__(self, unet: UNet2DConditionModel):
        self._count = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self._count)
        self._replicas = [unet, *(copy.deepcopy(unet) for _ in range(self._count - 1))]
        for replica in self._replicas[1:]:
            for parameter, shared in zip(replica.parameters(), unet.parameters(), strict=True):
                parameter.data = shared.data
        self._alphas = alphas_cumprod()

    def gradients(self, context: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As ``OneDevice.gradients``."""
        shares = zip(*(t.chunk(self._count) for t in (context, latents, noise, timesteps)), strict=True)
        losses = list(self._pool.map(self._share, self._replicas, shares))
        mine, *others = ([p.grad for p in replica.parameters()] for replica in self._replicas)
        for gradients in others:
            torch._foreach_add_(mine, gradients)
            torch._foreach_zero_(gradients)
        torch._foreach_div_(mine, self._count)
        return torch.stack(losses).mean()

    def _share(self, replica: UNet2DConditionModel, share: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        with lowered(torch.device("cpu")), sdpa_kernel([SDPBackend.MATH]):
            loss = denoising_loss(replica, *share, self._alphas)
        loss.backward()
        return loss.detach()


def train_unet(
    unet: UNet2DConditionModel, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, latents: Latents, work: Path,
    sizes: Sizes,
) -> UNet2DConditionModel:  # fmt: skip
    """Train, or resume from ``work/unet.pt``; returns the averaged weights. All draws are functions of (seed, step)."""
    device, batch, peak = sizes.device, sizes.unet_batch, LEARNING_RATE * sizes.rate
    unet = unet.to(device).train()
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint, first, spent = work / "unet.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["spent"]
    if first >= sizes.unet_steps:
        return average
    budget = Budget(steps=sizes.unet_steps, seconds=sizes.unet_seconds, spent=spent)
    embeddings = CaptionEmbeddings(encoder, tokenizer, latents, device)
    worker = Workers(unet) if device.type == "cpu" else OneDevice(unet)
    averaged, current, values = list(average.parameters()), list(unet.parameters()), latents.values.to(device)
    step, saved, recent = first, time.monotonic(), torch.zeros((), device=device)
    while (share := budget.share(step)) < 1:
        rng = np.random.default_rng([SEED, step])
        rows = rng.integers(len(values), size=batch)
        clean = values[torch.from_numpy(rows).to(device)]
        generator = torch.Generator(device).manual_seed(SEED * 1_000_003 + step)
        noise = torch.randn(clean.shape, device=device, generator=generator)
        strata = (rng.permutation(batch) + rng.random(batch)) / batch
        timesteps = torch.from_numpy((strata * 1000).astype(np.int64)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = late_descent_rate(share, step, peak, WARMUP)
        recent = torch.lerp(recent, worker.gradients(embeddings.draw(rows, rng), clean, noise, timesteps), 0.01)
        torch.nn.utils.clip_grad_norm_(current, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, current, 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        step += 1
        if step % 200 == 0:
            said = f"unet {step} of {sizes.unet_steps}, share {share:.3f}, loss {recent.item():.4f}"
            print(f"{said}, {(step - first) * batch / (budget.elapsed - spent):.0f} images/s", flush=True)
        if time.monotonic() - saved > 300:
            _save(checkpoint, unet, average, optimizer, step, budget.elapsed)
            saved = time.monotonic()
    print(f"unet: {step} steps, {budget.elapsed:.0f} s, loss {recent.item():.4f}", flush=True)
    _save(checkpoint, unet, average, optimizer, sizes.unet_steps, budget.elapsed)
    return average


def _save(
    file: Path, unet: UNet2DConditionModel, average: UNet2DConditionModel, optimizer: torch.optim.Optimizer, step: int,
    spent: float,
) -> None:  # fmt: skip
    partial = file.with_suffix(".partial")
    states = {"unet": unet.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**states, "step": step, "spent": spent}, partial)
    partial.replace(file)
