"""Rebuild the miniature base: ``python -m recipes.mini --art node_modules --work DIR``.

After an interruption, the same command resumes.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdlora import generate
from sdlora.base.checkpoint import MINI_FOLDER

from .art import load_art
from .export import export
from .latents import encode_all, standardise
from .measure import measure
from .sizes import sizes_for
from .sources import held_out_emoji, held_out_sources
from .start import Start
from .text import train_text_encoder
from .unet import train_unet
from .vae import train_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, required=True, help="the node_modules folder that `npm install` made")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="limit of the trainings together (default: none)")
    parser.add_argument("--small", action="store_true", help="a trial of every stage")
    parser.add_argument(
        "--start-from", type=Path, help="folder of a base of this recipe to go on from (default: nothing)"
    )
    parser.add_argument("--to", type=Path, default=MINI_FOLDER, help="folder of the base (default: the embedded one)")
    parser.add_argument("--no-measure", action="store_true", help="leave the measures out")
    parser.add_argument("--measure", action="store_true", help="only measure the base in the folder")
    arguments = parser.parse_args()
    arts = load_art(arguments.art)
    if not arguments.measure:
        arguments.work.mkdir(parents=True, exist_ok=True)
        torch.backends.cudnn.benchmark = True
        sizes = sizes_for(torch.device(arguments.device), seconds=arguments.seconds, small=arguments.small)
        if arguments.start_from is not None:
            sizes = replace(sizes, rate=0.5)
        places = ["--art", str(arguments.art), "--work", str(arguments.work)]
        amounts = ["--pool", str(sizes.pool), "--variants", str(sizes.variants)]
        subprocess.run([sys.executable, "-m", "recipes.mini.draw", *places, *amounts], check=True)
        began = time.monotonic()
        pool, composed = (np.load(arguments.work / f"{name}.npy", mmap_mode="r") for name in ("pool", "composed"))
        start = Start.new(arguments.art) if arguments.start_from is None else Start.of(arguments.start_from)
        vae = standardise(train_vae(start.vae, pool, arguments.work, sizes), composed)
        latents = encode_all(vae, composed, arts, arguments.art, arguments.work, sizes)
        encoder = train_text_encoder(start.text_encoder, start.tokenizer, latents, arguments.work, sizes)
        if arguments.seconds is not None:
            sizes = replace(sizes, unet_seconds=arguments.seconds - (time.monotonic() - began))
        unet = train_unet(start.unet, encoder, start.tokenizer, latents, arguments.work, sizes)
        export(arguments.to, vae, encoder, unet, start.tokenizer)

    def draw(prompts: list[str], seed: int) -> list[Image.Image]:
        generated = generate(prompts, base=str(arguments.to), seed=seed, precision="float32")
        return [result.image for result in generated]

    if not arguments.no_measure:
        print(measure(arguments.to, arts, held_out_emoji(arguments.art), held_out_sources(arguments.art), draw))


if __name__ == "__main__":
    main()
