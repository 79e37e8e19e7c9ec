"""What encoding before a run and sampling after it need on the device, from the real models without memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from ..base.base import Base
from ..base.conditioning import Framing, time_ids
from ..base.encode import encode_prompts
from ..base.tokens import padded, plain, tokenize
from .live_bytes import LiveBytes, attention_of
from .memory import model_bytes, stand_in_conditioning

STRIPS = 320_000_000
"""Bytes that decoding in strips needs at most, for an image of 1024 x 1024: see ``base.strips``."""
GUIDED_ROWS = 2
"""Rows of the UNet for each image under guidance: with the prompt, and with the negative prompt."""


@dataclass(frozen=True, kw_only=True)
class SamplingMemory:
    """Bytes on the device while one image is generated, LoRAs merged into the weights."""

    weights: int
    """UNet and VAE."""
    encoders: int
    """Text encoders, which a small device does not keep while it denoises."""
    merging: int
    """Two copies of the largest weight in float32, while LoRAs are merged."""
    denoising: int
    """The most that a step under guidance needs besides."""
    decoding: int
    """The most that decoding the image at once needs besides."""

    @property
    def total(self) -> int:
        """The most that is on the device at once, in bytes, where everything stays there."""
        return self.weights + self.encoders + max(self.merging, self.denoising, self.decoding)

    @property
    def least(self) -> int:
        """The most where memory is short: text encoders leave after encoding, and the image is decoded in strips."""
        alone = max(self.denoising, min(self.decoding, STRIPS))
        return self.weights + max(self.encoders + self.merging, alone)


def encoding_memory(base: Base, *, width: int, height: int, chunks: int, device_type: str) -> dict[str, int]:
    """Part -> bytes that it needs on the device while it encodes one image or caption: weights and highest point.

    Parts are on the device one at a time; the VAE encodes in float32. ``base`` is on the meta device; its VAE is in float32
    afterwards.
    """
    vae = base.vae.to(torch.float32)
    needed = {}
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(attention_of(device_type))
        counter = stack.enter_context(LiveBytes())
        posterior = vae.encode(torch.zeros(1, 3, height, width, device=base.device)).latent_dist
        del posterior
    needed["vae"] = model_bytes(vae) + counter.peak
    for encoder in base.text_encoders:
        alone = replace(base, text_encoders=(encoder,))
        with torch.no_grad(), attention_of(device_type), LiveBytes() as counter:
            encode_prompts(alone, [padded(alone, tokenize(alone, plain("")), chunks)])
        needed[encoder.facts.part] = model_bytes(encoder.model) + counter.peak
    return needed


def sampling_memory(base: Base, *, width: int, height: int, device_type: str) -> SamplingMemory:
    """What one image of ``width`` x ``height`` pixels needs under guidance; ``base`` is on the meta device."""
    factor, channels = base.checkpoint.latent_factor, base.unet.config["in_channels"]
    with torch.no_grad(), attention_of(device_type):
        with LiveBytes() as denoising:
            noisy = torch.zeros(GUIDED_ROWS, channels, height // factor, width // factor, device=base.device)
            timestep = torch.zeros((), dtype=torch.int64, device=base.device)
            sizes = time_ids([Framing.whole(width, height)] * GUIDED_ROWS).to(base.device)
            base.predict(noisy, timestep, stand_in_conditioning(base, GUIDED_ROWS, 1), sizes)
        with LiveBytes() as decoding:
            base.vae.decode(torch.zeros_like(noisy[:1], dtype=base.vae.dtype))
    return SamplingMemory(
        weights=model_bytes(base.unet) + model_bytes(base.vae),
        encoders=sum(map(model_bytes, base.encoder_models())),
        merging=2 * torch.float32.itemsize * max(parameter.numel() for parameter in base.unet.parameters()),
        denoising=denoising.peak,
        decoding=decoding.peak,
    )
