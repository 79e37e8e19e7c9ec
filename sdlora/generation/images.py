"""From requests and LoRAs to images with the recipe that made them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ..base.base import Base
from ..base.checkpoint import BaseCheckpoint
from ..base.decode import LatentDecoder
from ..formats.hashes import file_hashes
from ..lora.merging import temporarily_merged
from ..progress import Progress, raise_if_stopped
from .denoise import denoise
from .infotext import infotext
from .loras import WeightedLora
from .request import ImageRequest
from .saving import encoded

IMAGES_AT_ONCE, PIXELS_AT_ONCE = 4, 1024 * 1024
"""Neighbouring images are generated together, as many as stay within both; at 1024 x 1024 one occupies any device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedImage:
    """An image with its recipe in A1111's form; ``latents`` are (4, h/8, w/8) float32 at the latent scale, on the CPU."""

    image: Image.Image
    latents: Tensor
    parameters: str
    request: ImageRequest

    def _repr_png_(self) -> bytes:
        """The image as PNG with its recipe: notebooks show it."""
        return encoded(self.image, ".png", self.parameters)


@torch.no_grad()
def generate_images(
    base: Base,
    requests: Sequence[ImageRequest],
    loras: Sequence[WeightedLora],
    progress: Progress,
    stop: threading.Event | None = None,
    on_image: Callable[[GeneratedImage], None] | None = None,
    *,
    vae_tiling: bool = False,
) -> list[GeneratedImage]:
    """Generate every request under the same LoRAs, which are merged into ``base`` for as long as this takes.

    ``on_image`` is called with each image as soon as it is done, in the order of ``requests``. ``vae_tiling`` decodes in
    strips from the start (``base.decode``).

    Raises:
        BaseModelError: the UNet or the VAE produced NaN or Inf.
        Interrupted: ``stop`` was set.
    """
    if not requests:
        return []
    checkpoint = base.checkpoint
    base_autov2 = file_hashes(checkpoint.file, progress).autov2 if checkpoint.file else None
    images: list[GeneratedImage] = []
    progress.start("Generating", sum(request.steps for request in requests))
    decode = LatentDecoder(base, tiled=vae_tiling)
    with temporarily_merged(base.modules(), [lora.changes() for lora in loras]):
        for batch in _batches(requests, checkpoint):
            latents = denoise(base, batch, progress, stop)
            raise_if_stopped(stop, "stopped while generating")
            pixels = decode(latents).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            for request, latent, array in zip(batch, latents, pixels, strict=True):
                image = GeneratedImage(
                    image=Image.fromarray(array),
                    latents=latent.float().cpu(),
                    parameters=infotext(request, base=checkpoint, base_autov2=base_autov2, loras=loras),
                    request=request,
                )
                images.append(image)
                if on_image:
                    on_image(image)
    return images


def _batches(requests: Sequence[ImageRequest], checkpoint: BaseCheckpoint) -> list[list[ImageRequest]]:
    """Neighbours that differ in nothing but prompts and seeds, as many as are generated together."""
    batches: list[list[ImageRequest]] = []
    for request in requests:
        width, height = request.size_on(checkpoint)
        most = min(IMAGES_AT_ONCE, max(1, PIXELS_AT_ONCE // (width * height)))
        if batches and len(batches[-1]) < most and _settings(batches[-1][0]) == _settings(request):
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def _settings(request: ImageRequest) -> ImageRequest:
    return replace(request, prompt="", negative="", seed=0)
