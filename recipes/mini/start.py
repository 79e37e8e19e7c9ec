"""What training starts from: random weights, or those of a base that the recipe made before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .text import TOKENS, new_text_encoder, new_tokenizer
from .unet import new_unet
from .vae import new_vae


@dataclass(frozen=True, kw_only=True)
class Start:
    """The parts before training, float32."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel

    @staticmethod
    def new(node_modules: Path) -> Start:
        """Random weights; a tokenizer learned from the captions and the names of all emoji."""
        tokenizer = new_tokenizer(node_modules)
        return Start(vae=new_vae(), tokenizer=tokenizer, text_encoder=new_text_encoder(tokenizer), unet=new_unet())

    @staticmethod
    def of(folder: Path) -> Start:
        """The parts of the base in ``folder``, in the sizes that they have there; its tokenizer stays as it is."""
        return Start(
            vae=AutoencoderKL.from_pretrained(folder / "vae").float(),
            tokenizer=_tokenizer(folder / "tokenizer"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet").float(),
        )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """From vocabulary and merges alone: one that ``from_pretrained`` opens saves how it was opened, too."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
