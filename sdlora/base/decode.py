"""Latents to pixels and back, in the memory that there is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import DeviceMemoryError
from .base import Base
from .device_memory import out_of_memory, release_memory
from .encode import Posterior, check_finite, encode_pixels, posterior_of
from .strips import decode_in_strips, encode_in_strips

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class _AtOnceOrInStrips:
    """Has the VAE compute images whole, until its device has too little memory for that, and then in strips."""

    def __init__(self, work: str, *, tiled: bool):
        """``work`` is what the VAE does, encode or decode; ``tiled`` does so in strips from the start."""
        self._work, self._tiled = work, tiled

    def __call__(
        self,
        at_once: Callable[[], Result],
        in_strips: Callable[[], Result],
        device: torch.device,
        *,
        width: int,
        height: int,
    ) -> Result:
        """What ``at_once`` or ``in_strips`` returns, for an image of ``width`` x ``height`` pixels on ``device``.

        Where the device's memory does not suffice, a warning is logged, and this and all later ones are done in strips.

        Raises:
            DeviceMemoryError: the memory does not suffice for strips either.
        """
        if not self._tiled:
            try:
                return at_once()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # After the except block, which keeps what the VAE had computed.
            release_memory(device)
            logger.warning(
                "the %s has too little memory to %s an image at once; it is %sd in strips, which takes longer",
                device.type, self._work, self._work,
            )  # fmt: skip
            self._tiled = True
        try:
            return in_strips()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        release_memory(device)
        raise DeviceMemoryError(
            f"the {device.type} has too little memory to {self._work} an image of {width} x {height} pixels, even in "
            "strips; choose a smaller size, or end other programs that use its memory"
        )


class LatentDecoder:
    """Decodes latents of one base, in strips once that has been necessary."""

    def __init__(self, base: Base, *, tiled: bool = False):
        """``tiled`` decodes in strips from the start (``base.strips``)."""
        self._base, self._fitting = base, _AtOnceOrInStrips("decode", tiled=tiled)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (b, 4, h, w) at the latent scale -> pixels (b, 3, 8h, 8w) float32 in [0, 1], in main memory.

        On the CPU they are decoded together, on any other device one by one, in less memory and hardly slower. Where the
        device's memory does not suffice, a warning is logged, and these and all later ones are decoded in strips.

        Raises:
            BaseModelError: the latents hold NaN or Inf, or the VAE produced them.
            DeviceMemoryError: the memory does not suffice for strips either.
        """
        check_finite(self._base, latents, "the UNet")
        at_once = latents.shape[0] if latents.device.type == "cpu" else 1
        decoded = torch.cat([self._decoded(some) for some in latents.split(at_once)])
        check_finite(self._base, decoded, "the VAE")
        return decoded.div(2).add(0.5).clamp(0, 1)

    def _decoded(self, latents: Tensor) -> Tensor:
        vae, factor = self._base.vae, self._base.checkpoint.latent_factor
        scaled = latents.to(vae.dtype) / self._base.checkpoint.latent_scale
        return self._fitting(
            lambda: vae.decode(scaled).sample.float().cpu(),
            lambda: decode_in_strips(vae, scaled).float(),
            latents.device,
            width=latents.shape[3] * factor,
            height=latents.shape[2] * factor,
        )


class PixelEncoder:
    """Encodes images with one base, in strips once that has been necessary."""

    def __init__(self, base: Base, *, tiled: bool = False):
        """``tiled`` encodes in strips from the start (``base.strips``)."""
        self._base, self._fitting = base, _AtOnceOrInStrips("encode", tiled=tiled)

    def __call__(self, pixels: Tensor) -> Posterior:
        """``encode_pixels`` of one image, (1, 3, h, w) float32 in [-1, 1].

        Where the device's memory does not suffice, a warning is logged, and this and all later ones are encoded in strips.

        Raises:
            BaseModelError: the VAE produced NaN or Inf.
            DeviceMemoryError: the memory does not suffice for strips either.
        """
        base = self._base
        return self._fitting(
            lambda: encode_pixels(base, pixels),
            lambda: posterior_of(base, encode_in_strips(base.vae, pixels.to(base.vae.dtype), base.device)),
            base.device,
            width=pixels.shape[3],
            height=pixels.shape[2],
        )
