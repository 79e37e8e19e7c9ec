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

from .latents import Latents
from .text import TOKENS, WIDTH, token_tables
from .vae import learning_rate_constant

BATCH = 32
LEARNING_RATE, WARMUP = 8e-4, 300
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
EMA_DECAY, EMA_EVERY = 0.998, 2
SEED = 2


def alphas_cumprod() -> Tensor:
    """Scaled-linear betas of Stable Diffusion 1.x, (1000,) float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, 0)


def new_unet() -> UNet2DConditionModel:
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
    """Embeddings of every caption by the frozen text encoder, computed once and kept as bfloat16."""

    @torch.no_grad()
    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, latents: Latents):
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
        stored = torch.empty(len(rows) + 1, TOKENS, WIDTH, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(rows), 128):
                part = torch.stack(rows[start : start + 128])
                stored[start : start + len(part)] = encoder(part).last_hidden_state
            stored[-1] = encoder(self._empty).last_hidden_state[0]
        self._stored = stored

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """(b, 77, width) bfloat16: a random caption of each image in ``rows``, or sometimes the empty one."""
        chosen = [
            -1 if rng.random() < CAPTION_DROPOUT else self._numbers[row][int(rng.integers(len(self._numbers[row])))]
            for row in rows
        ]
        return self._stored[chosen]


def denoising_loss(unet, context, latents, noise, timesteps, alphas) -> Tensor:
    """Epsilon loss with min-SNR weighting (Hang et al. 2023, section 3.4: min(snr, gamma) / snr)."""
    a = alphas[timesteps][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    predicted = unet(noisy, timesteps, context).sample.float()
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
    return ((predicted - noise).square().mean(dim=(1, 2, 3)) * weight).mean()


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

    def gradients(self, context: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> float:
        """Write the gradients of the batch's mean loss to the UNet; returns that loss."""
        shares = zip(*(t.chunk(self._count) for t in (context, latents, noise, timesteps)), strict=True)
        losses = list(self._pool.map(self._share, self._replicas, shares))
        mine, *others = ([p.grad for p in replica.parameters()] for replica in self._replicas)
        for gradients in others:
            torch._foreach_add_(mine, gradients)
            torch._foreach_zero_(gradients)
        torch._foreach_div_(mine, self._count)
        return sum(losses) / self._count

    def _share(self, replica: UNet2DConditionModel, share: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel([SDPBackend.MATH]):
            loss = denoising_loss(replica, *share, self._alphas)
        loss.backward()
        return loss.item()


def train_unet(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, latents: Latents, work: Path, steps: int, decay_steps: int
) -> UNet2DConditionModel:
    """Train, or resume from ``work/unet.pt``; returns the averaged weights. All draws are functions of (seed, step)."""
    torch.manual_seed(SEED)
    unet = new_unet().train()
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint, first = work / "unet.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    if first >= steps:
        return average
    embeddings, workers = CaptionEmbeddings(encoder, tokenizer, latents), Workers(unet)
    averaged, current = list(average.parameters()), list(unet.parameters())
    started = saved = time.monotonic()
    losses: list[float] = []
    for step in range(first, steps):
        rng = np.random.default_rng([SEED, step])
        rows = rng.integers(len(latents.values), size=BATCH)
        clean = latents.values[torch.from_numpy(rows)]
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        strata = (rng.permutation(BATCH) + rng.random(BATCH)) / BATCH
        timesteps = torch.from_numpy((strata * 1000).astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_constant(step, steps, LEARNING_RATE, WARMUP, decay_steps)
        loss = workers.gradients(embeddings.draw(rows, rng), clean, noise, timesteps)
        torch.nn.utils.clip_grad_norm_(current, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if step % EMA_EVERY == 0:
            kept = min(EMA_DECAY, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(averaged, current, 1 - kept)
        losses.append(loss)
        if step % 100 == 99:
            rate = (step + 1 - first) * BATCH / (time.monotonic() - started)
            print(f"unet {step + 1}/{steps} loss {np.mean(losses[-100:]):.4f} {rate:.1f} img/s", flush=True)
        if time.monotonic() - saved > 300 or step == steps - 1:
            partial = checkpoint.with_suffix(".partial")
            state = {"unet": unet.state_dict(), "average": average.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
            partial.replace(checkpoint)
            saved = time.monotonic()
    return average
