"""Rebuild the miniature base: ``python -m recipes.mini --art node_modules --work DIR``.

After an interruption, the same command resumes.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
from pathlib import Path

from PIL import Image

from sdlora import generate
from sdlora.base.checkpoint import MINI_FOLDER

from .export import export
from .latents import encode_all, standardise
from .measure import measure
from .text import new_tokenizer, train_text_encoder
from .unet import train_unet
from .vae import train_vae


def draw(prompts: list[str], seed: int) -> list[Image.Image]:
    generated = generate(prompts, base=str(MINI_FOLDER), seed=seed, precision="float32")
    return [result.image for result in generated]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, required=True, help="the node_modules folder that `npm install` made")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of the UNet (default: %(default)s)")
    parser.add_argument(
        "--decay-steps", type=int, default=1500, help="last steps, with falling learning rate (default: %(default)s)"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    vae = standardise(train_vae(arguments.art, arguments.work), arguments.art)
    latents, tokenizer = encode_all(vae, arguments.art, arguments.work), new_tokenizer(arguments.art)
    encoder = train_text_encoder(tokenizer, latents, arguments.work)
    unet = train_unet(encoder, tokenizer, latents, arguments.work, arguments.steps, arguments.decay_steps)
    export(MINI_FOLDER, vae, encoder, unet, tokenizer)
    print(measure(MINI_FOLDER, arguments.art, draw))
