"""The public functions ``generate`` and ``generate_strip``: a base is loaded for one call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from PIL import Image

from ..config.sections import BaseSection
from ..progress import Progress
from .arguments import DrawingOptions, LoraArgument, PromptArgument, SamplingOptions
from .request import ImageRequest
from .strip import STRENGTHS
from .studio import open

if TYPE_CHECKING:
    from .images import GeneratedImage


def generate(
    prompts: PromptArgument | Sequence[PromptArgument],
    *,
    base: str | Path | BaseSection = "mini",
    loras: LoraArgument | Sequence[LoraArgument] = (),
    negative: str = ImageRequest.negative,
    seed: int | None = None,
    count: int = 1,
    steps: int = ImageRequest.steps,
    cfg: float = ImageRequest.cfg,
    size: int | tuple[int, int] | None = ImageRequest.size,
    sampler: str = ImageRequest.sampler,
    precision: str = "auto",
    vae_tiling: bool = False,
    batch_size: int | None = None,
    lora_dir: str | Path | None = None,
    wildcards: str | Path | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    on_image: Callable[[GeneratedImage], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    **drawing: Unpack[DrawingOptions],
) -> list[GeneratedImage]:
    """Generate ``count`` images of each prompt, with seeds ``seed``, ``seed + 1`` …, under all ``loras`` at once.

    Args:
        prompts: in A1111's syntax, ``(word:1.2)``, ``[a:b:0.5]``, ``AND``; of any length. Of ``{a|b}`` the image's seed
            draws one. Those of ``read_prompts`` have values of their own.
        base: the value of ``base.path`` in a configuration, or a whole ``[base]`` section.
        loras: one or several, each ``FILE[:UNET[:TE]]``, a path or a ``LoraChoice``.
        lora_dir: where tags of prompts, ``<lora:name:0.8>``, find their files; they are added to ``loras``.
        wildcards: folder of text files; ``__animal__`` in a prompt is a line of ``animal.txt``, chosen by the image's seed.
        seed: seed of the first image of each prompt, 0 to 2**32 - 1; None or -1 for a random one.
        cfg: classifier-free guidance scale; 1 switches guidance off.
        size: (width, height) in pixels, or the side of a square; by default the base's own square.
        sampler: a name of ``sdlora generate``, of A1111 (``DPM++ 2M Karras``), k-diffusion or diffusers.
        precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        vae_tiling: encode and decode in strips, in a fraction of the memory: the same image, later. It is done anyway
            where memory runs out.
        batch_size: the most images that are drawn together; by default as many as four, by their size. Each image is that
            which is drawn alone.
        progress: receives reports; by default a bar in a terminal.
        stop: set it, from any thread, to stop after the current step.
        on_image: called with each image as soon as it is done.
        say: called with the device, the precision and the free memory, before the base is loaded, and with trigger words
            that a prompt lacks.
        drawing: image to image and inpainting, see ``DrawingOptions``.

    Raises:
        SdloraError: a base, LoRA, size, sampler or precision that cannot be used, found before anything is generated.
        Interrupted: ``stop`` was set.
    """
    with open(
        base, precision=precision, vae_tiling=vae_tiling, batch_size=batch_size, lora_dir=lora_dir, wildcards=wildcards
    ) as studio:
        return studio.generate(
            prompts, loras=loras, negative=negative, seed=seed, count=count, steps=steps, cfg=cfg, size=size,
            sampler=sampler, progress=progress, stop=stop, on_image=on_image, say=say, **drawing,
        )  # fmt: skip


def generate_strip(
    prompts: str | Sequence[str],
    *,
    base: str | Path | BaseSection = "mini",
    loras: LoraArgument | Sequence[LoraArgument],
    strengths: Sequence[float] = STRENGTHS,
    scale: int = 1,
    negative: str = ImageRequest.negative,
    seed: int | None = None,
    steps: int = ImageRequest.steps,
    cfg: float = ImageRequest.cfg,
    size: int | tuple[int, int] | None = ImageRequest.size,
    sampler: str = ImageRequest.sampler,
    precision: str = "auto",
    vae_tiling: bool = False,
    batch_size: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = lambda line: None,
    **sampling: Unpack[SamplingOptions],
) -> tuple[Image.Image, str]:
    """One labelled image: a row for each prompt, a column for each strength of each LoRA, and a last one for all LoRAs.

    ``strengths`` multiply the weights of ``loras``; strength 0 is shown once. Each image is enlarged ``scale`` times.
    Everything else is as in ``generate``, which raises the same. Returns the image and the parameters of all its parts.
    """
    with open(base, precision=precision, vae_tiling=vae_tiling, batch_size=batch_size) as studio:
        return studio.generate_strip(
            prompts, loras=loras, strengths=strengths, scale=scale, negative=negative, seed=seed, steps=steps, cfg=cfg,
            size=size, sampler=sampler, progress=progress, stop=stop, say=say, **sampling,
        )  # fmt: skip
