"""Train the text encoder and the denoiser of the miniature base together, on cached latents."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .art import BACKGROUNDS, STYLES, captions, compose, draw_placement, emoji, load_art, strange_word, subjects
from .vae import learning_rate_constant, to_tensor

VOCABULARY = 3072
TOKENS = 77
VARIANTS = 20
"""Placements of each picture that are encoded; training draws among them."""
CAPTIONS_PER_STEP, NOISES_PER_CAPTION = 16, 2
"""Each caption is encoded once and denoised at several noise levels: the text encoder is a quarter of a step."""
LEARNING_RATE, WARMUP = 8e-4, 300
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
EMA_DECAY = 0.999
SEED = 2
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""How CLIP's tokenizer cuts text into words."""
LATENT_STD = 1 / 0.18215
"""The standard deviation that Stable Diffusion 1.x's latent scale of 0.18215 expects."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """``values`` (n, 4, 16, 16) float32 at unit scale; ``captions[i]`` are the wordings of ``values[i]``."""

    values: torch.Tensor
    captions: list[list[str]]


def alphas_cumprod() -> torch.Tensor:
    """Scaled-linear betas of Stable Diffusion 1.x, (1000,) float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, 0)


def new_tokenizer(node_modules: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's form, learned from the captions and from the names and tags of all emoji."""
    words = [c for _, s, _ in subjects() for style in STYLES for b in BACKGROUNDS for c in captions(s, style, b)]
    for entry in emoji(node_modules):
        words += [entry["label"], *entry.get("tags", [])] * 3
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP_WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(alphabet),
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    symbols = sorted(alphabet)
    ordered = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(ordered))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 192, 224),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=256,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=32,
    )


@torch.no_grad()
def standardise(vae: AutoencoderKL, node_modules: Path) -> AutoencoderKL:
    """A VAE whose latents of the training pictures have mean 0 and standard deviation 1 / 0.18215 in every channel.

    Diffusion from pure noise cannot move a channel's mean far, so the mean is folded away: an affine map per channel
    goes into ``quant_conv`` and its inverse into ``post_quant_conv``; decoded pictures stay the same.
    """
    rng = np.random.default_rng(SEED)
    pixels = to_tensor([compose(art, draw_placement(rng, art.mirror)) for art in load_art(node_modules)])
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(32)])
    shift, scale = means.mean(dim=(0, 2, 3)), LATENT_STD / means.std(dim=(0, 2, 3))
    vae = copy.deepcopy(vae)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:4] = (quant.bias[:4] - shift) * scale
    quant.weight[:4] *= scale[:, None, None, None]
    quant.bias[4:] += 2 * scale.log()
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight /= scale[None, :, None, None]
    vae.register_to_config(scaling_factor=0.18215)
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderKL, node_modules: Path, work: Path) -> Latents:
    """Latents of every picture in ``VARIANTS`` placements, kept in ``work/latents.safetensors``."""
    file, rng = work / "latents.safetensors", np.random.default_rng(SEED)
    arts = load_art(node_modules)
    places = [(art, draw_placement(rng, art.mirror)) for art in arts for _ in range(VARIANTS)]
    known = sorted({tag for entry in emoji(node_modules) for tag in entry.get("tags", [])})
    wordings = []
    for art, place in places:
        texts = captions(art.subject, art.style, place.background)
        wordings.append(
            texts + [f"{strange_word(rng, known)}, {texts[int(rng.integers(len(texts)))]}" for _ in range(2)]
        )
    if not file.exists():
        parts = []
        for start in range(0, len(places), 32):
            pixels = to_tensor([compose(art, place) for art, place in places[start : start + 32]])
            parts.append(vae.encode(pixels).latent_dist.mean / LATENT_STD)
        save_file({"latents": torch.cat(parts)}, file)
    return Latents(values=load_file(file)["latents"], captions=wordings)


def denoising_loss(unet, text_encoder, ids, latents, noise, timesteps, alphas) -> torch.Tensor:
    """Epsilon loss with min-SNR weighting (Hang et al. 2023, eq. 8: min(snr, gamma) / snr)."""
    a = alphas[timesteps][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    context = text_encoder(ids).last_hidden_state.repeat_interleave(NOISES_PER_CAPTION, 0)
    predicted = unet(noisy, timesteps, context).sample.float()
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
    return ((predicted - noise).square().mean(dim=(1, 2, 3)) * weight).mean()


def train_unet(vae: AutoencoderKL, node_modules: Path, work: Path, steps: int, decay_steps: int):
    """Train, or go on from ``work/unet.pt``; returns (text encoder, UNet, tokenizer) with averaged weights."""
    torch.manual_seed(SEED)
    tokenizer = new_tokenizer(node_modules)
    text_encoder, unet = new_text_encoder(tokenizer), new_unet()
    models_ = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).train()
    average = copy.deepcopy(models_).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(models_.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint, first = work / "unet.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        models_.load_state_dict(state["models"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    latents = encode_all(vae, node_modules, work)
    tables = [torch.tensor(tokenizer(c, padding="max_length", truncation=True).input_ids) for c in latents.captions]
    empty = torch.tensor(tokenizer("", padding="max_length").input_ids)
    alphas, batch = alphas_cumprod(), CAPTIONS_PER_STEP * NOISES_PER_CAPTION
    started = saved = time.monotonic()
    pairs = list(zip(average.parameters(), models_.parameters(), strict=True))
    losses = []
    for step in range(first, steps):
        rng = np.random.default_rng([SEED, step])
        rows = rng.integers(len(tables), size=CAPTIONS_PER_STEP)
        ids = [tables[r][int(rng.integers(len(tables[r])))] if rng.random() >= CAPTION_DROPOUT else empty for r in rows]
        clean = latents.values[torch.from_numpy(rows).repeat_interleave(NOISES_PER_CAPTION)]
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        strata = (rng.permutation(batch) + rng.random(batch)) / batch
        timesteps = torch.from_numpy((strata * 1000).astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_constant(step, steps, LEARNING_RATE, WARMUP, decay_steps)
        with torch.autocast(clean.device.type, torch.bfloat16), sdpa_kernel([SDPBackend.MATH]):
            loss = denoising_loss(unet, text_encoder, torch.stack(ids), clean, noise, timesteps, alphas)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models_.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            kept = min(EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - kept)
        losses.append(loss.item())
        if step % 100 == 99:
            rate = (step + 1 - first) * batch / (time.monotonic() - started)
            print(f"unet {step + 1}/{steps} loss {np.mean(losses[-100:]):.4f} {rate:.1f} img/s", flush=True)
        if time.monotonic() - saved > 180 or step == steps - 1:
            partial = checkpoint.with_suffix(".partial")
            state = {"models": models_.state_dict(), "average": average.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
            partial.replace(checkpoint)
            saved = time.monotonic()
    return average["text_encoder"], average["unet"], tokenizer
