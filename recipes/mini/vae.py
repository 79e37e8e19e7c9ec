"""Train the autoencoder of the miniature base: 128 px images to 4 x 16 x 16 latents and back."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .art import BACKGROUNDS, RASTER, SIZE
from .budget import Budget, cosine_rate
from .kinds import HELD_OUT, Sources
from .sizes import Sizes, lowered

WARMUP, PEAK_RATE = 200, 1.2e-3
KL_WEIGHT, GRADIENT_WEIGHT, ENERGY_WEIGHT = 2e-5, 0.5, 0.03
WHOLE_SHARE = 0.6
"""From this share of the training on, whole images instead of crops."""
EMA_DECAY = 0.999
SEED = 1
FIRST_BACKGROUNDS = 6
"""PSNR of held-out emoji is measured on the backgrounds of the first edition."""


def new_vae() -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 192),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def to_tensor(images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 (h, w, 3) each -> float32 (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def crops(pool: Tensor, rng: np.random.Generator, batch: int, side: int) -> Tensor:
    """Random squares of random images of ``pool`` (n, RASTER, RASTER, 3) uint8 -> (batch, 3, side, side) float32.

    Half are mirrored, some lie on their side, a third have their channels in another order, a tenth are inverted.
    """
    device, reach = pool.device, RASTER - side + 1
    draws = {
        "image": rng.integers(len(pool), size=batch), "top": rng.integers(reach, size=batch),
        "left": rng.integers(reach, size=batch),
    }  # fmt: skip
    image, top, left = (torch.from_numpy(draw).to(device) for draw in draws.values())
    span = torch.arange(side, device=device)
    rows, columns = top[:, None] + span, left[:, None] + span
    pixels = (
        pool[image[:, None, None], rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .float()
        .div_(127.5)
        .sub_(1)
    )
    chosen = [torch.from_numpy(rng.random(batch) < share).to(device)[:, None, None, None] for share in (0.5, 0.3, 0.1)]
    pixels = torch.where(chosen[0], pixels.flip(-1), pixels)
    pixels = torch.where(chosen[1], pixels.transpose(-1, -2), pixels)
    order = np.stack([rng.permutation(3) if rng.random() < 0.33 else np.arange(3) for _ in range(batch)])
    pixels = pixels.gather(1, torch.from_numpy(order).to(device)[:, :, None, None].expand_as(pixels))
    return torch.where(chosen[2], -pixels, pixels)


def local_energy(pixels: Tensor) -> Tensor:
    """Mean squared gradient in windows of 8 px, (b, 1, h / 8, w / 8)."""
    across = F.pad(pixels.diff(dim=-1), (0, 1)).square()
    down = F.pad(pixels.diff(dim=-2), (0, 0, 0, 1)).square()
    return F.avg_pool2d((across + down).mean(1, keepdim=True), 8)


def loss_of(vae: AutoencoderKL, pixels: Tensor, noise: Tensor) -> Tensor:
    """Absolute error of pixels and gradients, what is lacking of the edges' energy, and the KL divergence."""
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    gradients = sum((decoded.diff(dim=d) - pixels.diff(dim=d)).abs().mean() for d in (-1, -2))
    lost = (local_energy(pixels) + 1e-3).log() - (local_energy(decoded) + 1e-3).log()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    pixel = (decoded - pixels).abs().mean() + 0.5 * (decoded - pixels).square().mean()
    return pixel + GRADIENT_WEIGHT * gradients + ENERGY_WEIGHT * lost.abs().mean() + KL_WEIGHT * kl


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The images and what the posterior means decode to, (n, 3, h, w) float32 in [-1, 1]."""
    pixels = to_tensor(images)
    parts = [
        vae.decode(vae.encode(part.to(vae.device)).latent_dist.mean).sample.clamp(-1, 1) for part in pixels.split(32)
    ]
    return pixels, torch.cat(parts).float().cpu()


def decibels(pixels: Tensor, decoded: Tensor) -> float:
    """Mean PSNR of the images."""
    return float((-10 * ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()).mean())


def edges_kept(pixels: Tensor, decoded: Tensor) -> float:
    """Mean squared gradient, decoded over original."""

    def energy(images: Tensor) -> Tensor:
        return sum((images.diff(dim=d).square().mean() for d in (-1, -2)), torch.zeros(()))

    return float(energy(decoded) / energy(pixels))


def psnr(vae: AutoencoderKL, held_out: Sequence[np.ndarray], count: int = 96) -> float:
    """Mean PSNR in dB of ``count`` emoji, decoded from posterior means: 128 px, on coloured backgrounds."""
    rng, images = np.random.default_rng(9), []
    grounds = list(BACKGROUNDS.values())[:FIRST_BACKGROUNDS]
    for art in list(held_out)[:: max(1, len(held_out) // count)][:count]:
        canvas = Image.new("RGB", (SIZE, SIZE), grounds[int(rng.integers(len(grounds)))])
        drawing = Image.fromarray(art).resize((112, 112), Image.Resampling.LANCZOS)
        canvas.paste(drawing, (8, 8), drawing)
        images.append(np.asarray(canvas))
    return decibels(*reconstructed(vae, images))


@dataclass(frozen=True, kw_only=True)
class Carried:
    """How well images of a kind that was never trained on come through."""

    kind: str
    decibels: float
    edges: float


def carried(vae: AutoencoderKL, sources: Sources, count: int = 32) -> list[Carried]:
    """For each held-out kind, ``count`` images at 128 px."""
    results = []
    for kind in HELD_OUT:
        rng = np.random.default_rng(5)
        images = [
            np.asarray(Image.fromarray(kind(rng, sources)).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            for _ in range(count)
        ]
        pair = reconstructed(vae, images)
        results.append(Carried(kind=kind.__name__, decibels=decibels(*pair), edges=edges_kept(*pair)))
    return results


def train_vae(vae: AutoencoderKL, pool: np.ndarray, work: Path, sizes: Sizes) -> AutoencoderKL:
    """Train, or resume from ``work/vae.pt``; returns the averaged weights. All draws are functions of (seed, step)."""
    device, peak = sizes.device, PEAK_RATE * sizes.rate
    vae = vae.to(device).train()
    average = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), peak, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    checkpoint, first, spent = work / "vae.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["spent"]
    budget = Budget(steps=sizes.vae_steps, seconds=sizes.vae_seconds, spent=spent)
    if budget.share(first) >= 1:
        return average
    images = torch.from_numpy(np.array(pool)).to(device)
    averaged, current = list(average.parameters()), list(vae.parameters())
    step, saved, loss = first, time.monotonic(), torch.zeros(())
    while (share := budget.share(step)) < 1:
        rng = np.random.default_rng([SEED, step])
        whole = share > WHOLE_SHARE
        side, batch = (SIZE, max(1, sizes.vae_batch // 4)) if whole else (SIZE // 2, sizes.vae_batch)
        pixels = crops(images, rng, batch, side)
        generator = torch.Generator(device).manual_seed(SEED * 1_000_003 + step)
        noise = torch.randn(batch, 4, side // 8, side // 8, device=device, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(share, step, peak, WARMUP)
        with lowered(device):
            loss = loss_of(vae, pixels, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(current, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, current, 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        step += 1
        if step % 200 == 0:
            print(
                f"vae {step} of {sizes.vae_steps}, share {share:.3f}, loss {loss.item():.4f}, {budget.elapsed:.0f} s",
                flush=True,
            )
        if time.monotonic() - saved > 120:
            _save(checkpoint, vae, average, optimizer, step, budget.elapsed)
            saved = time.monotonic()
    print(f"vae: {step} steps, {budget.elapsed:.0f} s, last loss {loss.item():.4f}", flush=True)
    _save(checkpoint, vae, average, optimizer, sizes.vae_steps, budget.elapsed)
    return average


def _save(
    file: Path, vae: AutoencoderKL, average: AutoencoderKL, optimizer: torch.optim.Optimizer, step: int, spent: float
) -> None:
    partial = file.with_suffix(".partial")
    states = {"vae": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**states, "step": step, "spent": spent}, partial)
    partial.replace(file)
