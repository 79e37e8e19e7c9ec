"""Train the tokenizer and the text encoder of the miniature base: from captions to what their images look like.

Like CLIP, the text encoder learns from pairs of captions and images before the UNet is trained, and is frozen then. From
any position at or after the end token, linear heads must predict subject, style and background (if the caption names
them) and a coarse version of the image's latent, so each of those positions holds the meaning of the whole sentence.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .art import BACKGROUNDS, STYLES, captions, emoji, subjects
from .budget import Budget, cosine_rate
from .latents import Latents
from .sizes import Sizes, lowered

VOCABULARY, TOKENS, WIDTH = 3072, 77, 256
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""How CLIP's tokenizer splits text into words."""
PEAK_RATE, WARMUP = 1.5e-3, 50
POOLED = 8
SEED = 3


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
    torch.manual_seed(SEED)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_tables(tokenizer: CLIPTokenizer, latents: Latents) -> list[Tensor]:
    """(captions, 77) int64 for each latent."""
    numbers: dict[str, int] = {}
    for texts in latents.captions:
        for caption in texts:
            numbers.setdefault(caption, len(numbers))
    ids = torch.tensor(tokenizer(list(numbers), padding="max_length", truncation=True).input_ids)
    return [ids[[numbers[caption] for caption in texts]] for texts in latents.captions]


class Heads(nn.Module):
    """Linear heads on the hidden state of one position."""

    def __init__(self, latents: Latents):
        super().__init__()
        self.subject = nn.Linear(WIDTH, len(set(latents.subjects)))
        self.style = nn.Linear(WIDTH, len(set(latents.styles)))
        self.background = nn.Linear(WIDTH, len(set(latents.backgrounds)))
        self.image = nn.Linear(WIDTH, 4 * POOLED * POOLED)


def numbered(words: list[str]) -> tuple[list[str], Tensor]:
    """The distinct words, sorted, and the index of each word among them, (n,) int64."""
    known = sorted(set(words))
    return known, torch.tensor([known.index(word) for word in words])


def train_text_encoder(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, latents: Latents, work: Path, sizes: Sizes
) -> CLIPTextModel:
    """Train, or load ``work/text.pt``; returns the frozen text encoder."""
    device, batch, peak = sizes.device, sizes.text_batch, PEAK_RATE * sizes.rate
    checkpoint = work / "text.pt"
    if checkpoint.exists():
        encoder.load_state_dict(torch.load(checkpoint, weights_only=True))
        return encoder.eval().requires_grad_(False)
    heads = Heads(latents).to(device)
    encoder = encoder.to(device)
    labels = {
        "subject": numbered(latents.subjects),
        "style": numbered(latents.styles),
        "background": numbered(latents.backgrounds),
    }
    pooled = F.adaptive_avg_pool2d(latents.values, POOLED).flatten(1).to(device)
    tables, budget = token_tables(tokenizer, latents), Budget(steps=sizes.text_steps, seconds=sizes.text_seconds)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], peak, weight_decay=0.01, fused=True)
    step = 0
    while (share := budget.share(step)) < 1:
        rng = np.random.default_rng([SEED, step])
        rows = rng.integers(len(tables), size=batch)
        wordings = [int(rng.integers(len(tables[row]))) for row in rows]
        ids = torch.stack([tables[row][wording] for row, wording in zip(rows, wordings, strict=True)])
        ends = (ids == tokenizer.eos_token_id).int().argmax(1).numpy()
        positions = torch.from_numpy(rng.integers(ends, TOKENS)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(share, step, peak, WARMUP)
        with lowered(device):
            hidden = encoder(ids.to(device)).last_hidden_state[torch.arange(batch, device=device), positions].float()
        loss = F.smooth_l1_loss(heads.image(hidden), pooled[torch.from_numpy(rows).to(device)])
        for name, (words, numbers) in labels.items():
            said = torch.tensor([
                name == "subject" or words[numbers[row]] in latents.captions[row][wording]
                for row, wording in zip(rows, wordings, strict=True)
            ])  # fmt: skip
            if said.any():
                expected = numbers[rows][said].to(device)
                loss = loss + F.cross_entropy(getattr(heads, name)(hidden)[said.to(device)], expected)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            right = (heads.subject(hidden).argmax(1).cpu() == labels["subject"][1][rows]).float().mean()
            said_so = f"text {step} of {sizes.text_steps}, loss {loss.item():.3f}, subjects {right:.2f}"
            print(f"{said_so}, {budget.elapsed:.0f} s", flush=True)
    encoder = encoder.cpu()
    torch.save(encoder.state_dict(), checkpoint)
    print(f"text encoder: {step} steps, {budget.elapsed:.0f} s", flush=True)
    return encoder.eval().requires_grad_(False)
