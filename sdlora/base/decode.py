"""Latents to pixels and back, in the memory that there is."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..errors import DeviceMemoryError
from .base import Base
from .device_memory import out_of_memory, release_memory
from .encode import Posterior, check_finite, encode_pixels, posterior_of
from .strips import decode_in_strips, encode_in_strips

logger = logging.getLogger(__name__)


class LatentDecoder:
    """Decodes latents of one base, in strips once that has been necessary."""

    def __init__(self, base: Base, *, tiled: bool = False):
        """``tiled`` decodes in strips from the start (``base.strips``)."""
        self._base, self._tiled = base, tiled

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
        vae = self._base.vae
        scaled = latents.to(vae.dtype) / self._base.checkpoint.latent_scale
        if not self._tiled:
            try:
                return vae.decode(scaled).sample.float().cpu()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # After the except block, which keeps what the decoder had computed.
            release_memory(latents.device)
            logger.warning(
                "the %s has too little memory to decode an image at once; it is decoded in strips, which takes longer",
                latents.device.type,
            )
            self._tiled = True
        try:
            return decode_in_strips(vae, scaled).float()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        factor = self._base.checkpoint.latent_factor
        raise DeviceMemoryError(
            f"the {latents.device.type} has too little memory to decode an image of {latents.shape[3] * factor} x "
            f"{latents.shape[2] * factor} pixels, even in strips; choose a smaller size, or end other programs that use its "
            "memory"
        )


class PixelEncoder:
    """Encodes images with one base, in strips once that has been necessary."""

    def __init__(self, base: Base, *, tiled: bool = False):
        """``tiled`` encodes in strips from the start (``base.strips``)."""
        self._base, self._tiled = base, tiled

    def __call__(self, pixels: Tensor) -> Posterior:
        """``encode_pixels`` of one image, (1, 3, h, w) float32 in [-1, 1].

        Where the device's memory does not suffice, a warning is logged, and this and all later ones are encoded in strips.

        Raises:
            BaseModelError: the VAE produced NaN or Inf.
            DeviceMemoryError: the memory does not suffice for strips either.
        """
        base = self._base
        if not self._tiled:
            try:
                return encode_pixels(base, pixels)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # After the except block, which keeps what the encoder had computed.
            release_memory(base.device)
            logger.warning(
                "the %s has too little memory to encode an image at once; it is encoded in strips, which takes longer",
                base.device.type,
            )
            self._tiled = True
        try:
            return posterior_of(base, encode_in_strips(base.vae, pixels.to(base.vae.dtype), base.device))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        release_memory(base.device)
        raise DeviceMemoryError(
            f"the {base.device.type} has too little memory to encode an image of {pixels.shape[3]} x {pixels.shape[2]} "
            "pixels, even in strips; choose a smaller size, or end other programs that use its memory"
        )
