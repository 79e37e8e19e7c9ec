"""Train the autoencoder of the miniature base: 128 px images to 4 x 16 x 16 latents and back."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from .art import BACKGROUNDS, SIZE, load_gallery


@dataclass(frozen=True, kw_only=True)
class Phase:
    """``steps`` on ``batch`` images of ``crop`` px; ``shapes`` is the share of images with random shapes in them.

    Crops of 64 px give four times as many images for the same work, and no flat margins.
    """

    steps: int
    crop: int
    batch: int
    shapes: float


CYCLES = (
    (1.5e-3, (Phase(steps=3400, crop=64, batch=24, shapes=0.15), Phase(steps=1800, crop=SIZE, batch=8, shapes=0.15))),
    (7e-4, (Phase(steps=1600, crop=64, batch=24, shapes=0.3),)),
)
"""Peak learning rate and phases of each cosine cycle (warm restarts, Loshchilov & Hutter 2017)."""
STEPS = sum(phase.steps for _, phases in CYCLES for phase in phases)
WARMUP = 100
KL_WEIGHT, GRADIENT_WEIGHT = 3e-4, 0.5
SEED = 1


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def random_colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(c) for c in rng.integers(0, 256, 3))


def draw_shapes(canvas: Image.Image, rng: np.random.Generator) -> None:
    """Rectangles, ellipses and strokes in any colour, so that the autoencoder does not learn emoji alone."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(3, 24))):
        (x0, x1), (y0, y1) = np.sort(rng.integers(-8, SIZE + 8, 2)), np.sort(rng.integers(-8, SIZE + 8, 2))
        x1, y1 = min(x1, x0 + 64), min(y1, y0 + 64)
        colour, kind = random_colour(rng), rng.integers(3)
        if kind == 0:
            pen.rectangle((x0, y0, x1, y1), fill=colour)
        elif kind == 1:
            pen.ellipse((x0, y0, x1 + 1, y1 + 1), outline=colour, width=int(rng.integers(1, 4)))
        else:
            pen.line((x0, y0, x1, int(rng.integers(0, SIZE))), fill=colour, width=int(rng.integers(1, 5)))


def image(gallery: list[np.ndarray], rng: np.random.Generator, crop: int, shapes: float) -> np.ndarray:
    """A random training image, uint8 (crop, crop, 3)."""
    kind = rng.random()
    ground = list(BACKGROUNDS.values())[int(rng.integers(len(BACKGROUNDS)))] if kind < 0.7 else random_colour(rng)
    canvas = Image.new("RGB", (SIZE, SIZE), ground)
    if kind > 1 - shapes:
        draw_shapes(canvas, rng)
    if kind < 0.95:
        art = Image.fromarray(gallery[int(rng.integers(len(gallery)))])
        side = int(rng.integers(80, 132))
        art = art.resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(art, tuple(int(v) for v in rng.integers(min(0, SIZE - side), max(1, SIZE - side + 1), 2)), art)
    left, top = (int(v) for v in rng.integers(0, SIZE - crop + 1, 2))
    pixels = np.asarray(canvas)[top : top + crop, left : left + crop]
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.2:
        pixels = pixels[..., rng.permutation(3)]
    return 255 - pixels if rng.random() < 0.07 else pixels


def to_tensor(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 (h, w, 3) each -> float32 (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def loss_of(vae: AutoencoderKL, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    gradients = sum((decoded.diff(dim=d) - pixels.diff(dim=d)).abs().mean() for d in (-1, -2))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return (decoded - pixels).abs().mean() + GRADIENT_WEIGHT * gradients + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, held_out: list[np.ndarray], count: int = 96) -> float:
    """Mean PSNR in dB of ``count`` images, decoded from posterior means: 128 px, on coloured backgrounds."""
    rng, images = np.random.default_rng(9), []
    for art in held_out[:: max(1, len(held_out) // count)][:count]:
        canvas = Image.new("RGB", (SIZE, SIZE), list(BACKGROUNDS.values())[int(rng.integers(len(BACKGROUNDS)))])
        drawing = Image.fromarray(art).resize((112, 112), Image.Resampling.LANCZOS)
        canvas.paste(drawing, (8, 8), drawing)
        images.append(np.asarray(canvas))
    values = []
    for start in range(0, len(images), 16):
        pixels = to_tensor(images[start : start + 16])
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)).log10())
    return float(torch.cat(values).mean())


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def at_step(step: int) -> tuple[Phase, float]:
    """The phase of ``step``, and its learning rate."""
    for peak, phases in CYCLES:
        length = sum(phase.steps for phase in phases)
        if step < length:
            rate = learning_rate(step, length, peak, WARMUP)
            for phase in phases:
                if step < phase.steps:
                    return phase, rate
                step -= phase.steps
        step -= length
    raise ValueError("the training is over")


def train_vae(node_modules: Path, work: Path) -> AutoencoderKL:
    """Train, or resume from ``work/vae.pt``. All draws are functions of (seed, step)."""
    torch.manual_seed(SEED)
    vae = new_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), CYCLES[0][0], betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    checkpoint, first = work / "vae.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    if first >= STEPS:
        return vae.eval()
    gallery, held_out = load_gallery(node_modules)
    print(f"vae: {len(gallery)} images, {len(held_out)} held out, from step {first}", flush=True)
    started = saved = time.monotonic()
    for step in range(first, STEPS):
        rng = np.random.default_rng([SEED, step])
        phase, rate = at_step(step)
        crop, batch = phase.crop, phase.batch
        pixels = to_tensor([image(gallery, rng, crop, phase.shapes) for _ in range(batch)])
        noise = torch.from_numpy(rng.standard_normal((batch, 4, crop // 8, crop // 8), dtype=np.float32))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(pixels.device.type, torch.bfloat16):
            loss = loss_of(vae, pixels, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"vae {step}/{STEPS} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
        if time.monotonic() - saved > 120 or step == STEPS - 1:
            partial = checkpoint.with_suffix(".partial")
            torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
            partial.replace(checkpoint)
            saved = time.monotonic()
        if step % 800 == 799 or step == STEPS - 1:
            print(f"vae {step + 1}: {psnr(vae.eval(), held_out):.2f} dB held out", flush=True)
            vae.train()
    return vae.eval()


def learning_rate_constant(step: int, steps: int, peak: float, warmup: int, decay: int) -> float:
    """Linear warm-up, constant, and a linear descent to 1 % over the last ``decay`` steps."""
    return peak * min(1.0, (step + 1) / warmup, max(0.01, (steps - step) / max(1, decay)))
