"""From requests and LoRAs to images with the recipe that made them."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..base.base import Base
from ..base.checkpoint import BaseCheckpoint
from ..base.decode import LatentDecoder, PixelEncoder
from ..base.device_memory import free_memory, move_to, out_of_memory, release_memory
from ..errors import DeviceMemoryError
from ..formats.hashes import file_hashes
from ..lora.stack import Stack
from ..progress import Progress, raise_if_stopped
from .denoise import denoise
from .infotext import infotext
from .inversions import with_inversions
from .loras import WeightedLora, stacked
from .preview import watch_of
from .request import ImageRequest
from .saving import encoded
from .scheduled_prompt import ScheduledConditioning, encode_requests
from .start import Start, start_of
from .upscaling import as_arrays, enlarged, second_pass

IMAGES_AT_ONCE, PIXELS_AT_ONCE = 4, 1024 * 1024
"""Neighbouring images are generated together, as many as stay within both, where no number is stated; at 1024 x 1024 one
occupies any device."""
ROOM = 4 * 2**30
"""Bytes of free memory below which the text encoders leave a device while images are generated."""
logger = logging.getLogger(__name__)


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
    batch_size: int | None = None,
    stack: Stack | None = None,
) -> list[GeneratedImage]:
    """Generate every request under the same LoRAs, which are on ``base`` for as long as this takes.

    ``on_image`` is called with each image as soon as it is done, in the order of ``requests``. ``vae_tiling`` encodes and
    decodes in strips from the start (``base.decode``); ``batch_size`` images at most are drawn together. On a
    ``stack`` of the base's modules the LoRAs stay afterwards, so that the next call changes what differs.

    Raises:
        BaseModelError: the UNet or the VAE produced NaN or Inf.
        DeviceMemoryError: the device's memory does not suffice for one image.
        Interrupted: ``stop`` was set.
    """
    if not requests:
        return []
    base, checkpoint = with_inversions(base, requests, loras), base.checkpoint
    base_autov2 = file_hashes(checkpoint.file, progress).autov2 if checkpoint.file else None
    images: list[GeneratedImage] = []
    progress.start("Generating", sum(request.all_steps for request in requests))
    varying = [lora.choice for lora in loras if lora.choice.varies]
    decode, encode = LatentDecoder(base, tiled=vae_tiling), PixelEncoder(base, tiled=vae_tiling)
    denoised = _Denoiser(base, progress, stop)
    batches = _batches(requests, checkpoint, batch_size)

    def weigh(steps: int) -> Callable[[int], None] | None:
        """Called before each of ``steps``, for LoRAs whose weights vary over them."""
        return (lambda step: own.vary([choice.factor(step, steps) for choice in varying])) if varying else None

    with _applied(base, loras, stack) as own, _conditionings(base, batches) as conditionings:
        for batch, conditioning in zip(batches, conditionings, strict=True):
            latents = denoised(batch, conditioning, start_of(base, batch, encode), weigh(batch[0].steps_taken))
            if hires := batch[0].hires:
                start, steps = enlarged(base, batch, latents, decode, encode), hires.steps_taken(batch[0].steps)
                second = second_pass(batch, checkpoint)
                conditioning = conditioning.after(batch[0].steps_taken)
                latents = denoised(second, conditioning, start, weigh(steps))
            raise_if_stopped(stop, "stopped while generating")
            pixels = as_arrays(decode(latents))
            for request, latent, array in zip(batch, latents, pixels, strict=True):
                drawn = Image.fromarray(array)
                image = GeneratedImage(
                    image=drawn if request.start is None else request.start.pasted(drawn),
                    latents=latent.float().cpu(),
                    parameters=infotext(request, base=checkpoint, base_autov2=base_autov2, loras=loras),
                    request=request,
                )
                images.append(image)
                if on_image:
                    on_image(image)
    return images


@contextmanager
def _applied(base: Base, loras: Sequence[WeightedLora], stack: Stack | None) -> Generator[Stack]:
    """``loras`` on the base's modules, removed afterwards unless they are on a ``stack``."""
    own = stack or Stack(base.modules())
    entries, varying = stacked(loras)
    own.set(entries, varying=varying)
    try:
        yield own
    finally:
        if stack is None:
            own.restore()


@contextmanager
def _conditionings(base: Base, batches: Sequence[Sequence[ImageRequest]]) -> Generator[Iterator[ScheduledConditioning]]:
    """The conditioning of each batch. On a small device the text encoders are in main memory after the last was encoded."""
    if base.device.type == "mps" or free_memory(base.device) >= ROOM:
        yield (encode_requests(base, batch) for batch in batches)
        return
    main_memory, encoders = torch.device("cpu"), base.encoder_models()
    encoded = [encode_requests(base, batch).to(main_memory) for batch in batches]
    move_to(main_memory, *encoders)
    release_memory(base.device)
    try:
        yield (conditioning.to(base.device) for conditioning in encoded)
    finally:
        move_to(base.device, *encoders)


class _Denoiser:
    """``denoise`` of batches, one image after another once memory did not suffice for as many pixels together."""

    def __init__(self, base: Base, progress: Progress, stop: threading.Event | None):
        self._base, self._progress, self._stop = base, progress, stop
        self._watch = watch_of(base, progress)
        self._too_many = math.inf
        """Pixels of all rows of the UNet's batch that did not fit."""

    def __call__(
        self,
        batch: Sequence[ImageRequest],
        conditioning: ScheduledConditioning,
        start: Start | None,
        before_step: Callable[[int], None] | None,
    ) -> Tensor:
        """Latents of ``batch``, as ``denoise`` has them. Where memory does not suffice for all, a warning is logged.

        Raises:
            DeviceMemoryError: it does not suffice for one.
        """
        width, height = batch[0].size_on(self._base.checkpoint)
        pixels = conditioning.batch_size * width * height
        if len(batch) == 1 or pixels < self._too_many:
            try:
                return denoise(
                    self._base, batch, conditioning, self._progress, self._stop, before_step, start, self._watch
                )
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # After the except block, which keeps what the UNet had computed.
            release_memory(self._base.device)
            device = self._base.device.type
            if len(batch) == 1:
                raise DeviceMemoryError(
                    f"the {device} has too little memory for an image of {width} x {height} pixels; choose a smaller size, "
                    "or end other programs that use its memory"
                )
            logger.warning(
                "the %s has too little memory for %d images of %d x %d pixels at once; they are generated one by one",
                *(device, len(batch), width, height),
            )
            self._too_many = pixels
        rows = [(conditioning.of_image(number), start and start.row(number)) for number in range(len(batch))]
        return torch.cat([self([one], *row, before_step) for one, row in zip(batch, rows, strict=True)])


def _batches(
    requests: Sequence[ImageRequest], checkpoint: BaseCheckpoint, size: int | None = None
) -> list[list[ImageRequest]]:
    """Neighbours that differ in nothing but prompts and seeds, as many as are generated together."""
    batches: list[list[ImageRequest]] = []
    for request in requests:
        width, height = request.final_size_on(checkpoint)
        most = size or min(IMAGES_AT_ONCE, max(1, PIXELS_AT_ONCE // (width * height)))
        if batches and len(batches[-1]) < most and _settings(batches[-1][0]) == _settings(request):
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def _settings(request: ImageRequest) -> tuple[ImageRequest, bool]:
    return request.settings, request.is_guided
