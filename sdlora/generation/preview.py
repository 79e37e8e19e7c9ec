"""Images under way: what the UNet makes of the noise so far, small and soon. Nothing here runs unless somebody looks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from ..base.base import Base
from ..errors import SdloraError
from ..files import write_png
from ..progress import Progress

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
SECONDS_APART = 1.0
_DECODED_PARAMETERS = 20e6
"""A VAE of at most so many parameters decodes at once; Stable Diffusion's has 84 million."""
_LARGEST_SIDE = 512
_FACTORS: dict[str, tuple[Sequence[Sequence[float]], Sequence[float]]] = {
    "sd1": (
        ((0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350), (-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177)),
        (0.0, 0.0, 0.0),
    ),
    "sdxl": (
        ((0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068), (0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188)),
        (0.1084, -0.0175, -0.0011),
    ),
}
"""Red, green and blue in [-1, 1] of each channel of a latent, and what is added (ComfyUI, ``comfy/latent_formats.py``)."""
_FACTORS["sd2"] = _FACTORS["sd1"]

Watch = Callable[[Tensor, Tensor, Tensor], None]
"""Called with noisy latents as the UNet receives them, (b, 4, h, w), its guided prediction, and the timestep on the CPU."""


@runtime_checkable
class ShowsImages(Protocol):
    """A ``Progress`` that shows images under way too."""

    def show(self, image: Image.Image) -> None:
        """Show ``image``: all images of a batch side by side."""


def watch_of(base: Base, progress: Progress, clock: Callable[[], float] = time.monotonic) -> Watch | None:
    """What ``denoise`` calls after each prediction; None where ``progress`` shows no images.

    At most one image a second is made, since each reads from the device. A preview that fails is the last: a warning says
    why, and the images are made all the same.
    """
    if not isinstance(progress, ShowsImages):
        return None
    signal = base.schedule.alphas_cumprod.cpu()
    due = float("-inf")

    def watch(noisy: Tensor, predicted: Tensor, timestep: Tensor) -> None:
        nonlocal due
        if clock() < due:
            return
        try:
            share = float(signal[min(max(round(float(timestep)), 0), len(signal) - 1)])
            latents = clean_estimate(noisy, predicted, share, base.schedule.prediction)
            progress.show(preview_image(base, latents))
            due = clock() + SECONDS_APART
        except (OSError, RuntimeError, SdloraError) as error:
            due = float("inf")
            logger.warning("no further previews: %s", error)

    return watch


def clean_estimate(noisy: Tensor, predicted: Tensor, signal: float, prediction: str) -> Tensor:
    """The latents without noise that a prediction (ε, v or x) amounts to, where ``signal`` is ᾱ of the timestep.

    x = (xₜ - √(1 - ᾱ) ε) / √ᾱ (Ho et al. 2020, eq. 15); x = √ᾱ xₜ - √(1 - ᾱ) v (Salimans & Ho 2022, appendix D).
    """
    noise = (1 - signal) ** 0.5
    if prediction == "epsilon":
        return (noisy - noise * predicted) / max(signal, 1e-6) ** 0.5
    return predicted if prediction == "sample" else signal**0.5 * noisy - noise * predicted


def preview_image(base: Base, latents: Tensor) -> Image.Image:
    """Latents (b, 4, h, w) side by side: decoded where the VAE is small, else by a linear approximation of it."""
    from PIL import Image

    factor = base.checkpoint.latent_factor
    if sum(parameter.numel() for parameter in base.vae.parameters()) <= _DECODED_PARAMETERS:
        fitting = min(1.0, _LARGEST_SIDE / (factor * max(latents.shape[2:])))
        small = latents if fitting == 1 else functional.interpolate(latents, scale_factor=fitting, mode="area")
        with torch.no_grad():
            pixels = base.vae.decode((small / base.checkpoint.latent_scale).to(base.vae.dtype)).sample.float()
    else:
        weights, added = (
            torch.tensor(values, device=latents.device) for values in _FACTORS[base.checkpoint.family.name]
        )
        pixels = torch.einsum("bchw,cr->brhw", latents.float(), weights) + added[:, None, None]
        pixels = functional.interpolate(
            pixels, scale_factor=max(1, min(factor, _LARGEST_SIDE // max(pixels.shape[2:])))
        )
    row = torch.cat(list(pixels.div(2).add(0.5).nan_to_num(0).clamp(0, 1)), -1)
    return Image.fromarray(row.mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


class FilePreview:
    """Reports to another ``Progress``, and writes images under way to a file, which is replaced each time."""

    def __init__(self, progress: Progress, file: Path):
        self._progress, self._file = progress, file

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._progress.start(task, total, done)

    def advance(self, count: int = 1, note: str = "") -> None:
        self._progress.advance(count, note)

    def show(self, image: Image.Image) -> None:
        """Write ``image``. Raises ``OSError`` if the disk is full or cannot be written to."""
        write_png(self._file, image)
