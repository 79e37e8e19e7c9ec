"""The VAE, strip by strip: the same pixels and latents as at once, in a fraction of the device's memory.

What one layer gives to the next is whole, in main memory; the device has a strip of it. Group norms take mean and variance
over all strips, so unlike tiles that are computed apart, strips differ neither in colour nor at their edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .models import AutoencoderKL, DiagonalGaussianDistribution

STRIP_VALUES = 2**23
"""Numbers of a strip at most: 32 MB in float32, a few times that with what a layer computes on the way."""
_HOME = torch.device("cpu")


@torch.no_grad()
def decode_in_strips(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents (b, 4, h, w) at the VAE's scale, in its dtype and on its device -> values (b, 3, 8h, 8w) in main memory."""
    decoder: Any = vae.decoder
    device = latents.device
    quantized = latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)
    hidden = decoder.mid_block(decoder.conv_in(quantized), None).to(_HOME)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = _resnet(resnet, hidden, device)
        for upsampler in block.upsamplers or ():
            hidden = _by_strips(upsampler, device, hidden)
    norm = _whole_norm(decoder.conv_norm_out, hidden, device)
    return _by_strips(lambda strip: decoder.conv_out(decoder.conv_act(norm(strip))), device, hidden)


@torch.no_grad()
def encode_in_strips(vae: AutoencoderKL, pixels: Tensor, device: torch.device) -> DiagonalGaussianDistribution:
    """Values (b, 3, h, w) in the VAE's dtype -> the posterior of latents (b, 4, h/8, w/8) at the VAE's scale.

    ``device`` is that of the VAE, and of the result. Only the middle of the encoder, at the size of the latents, is computed
    at once.
    """
    encoder: Any = vae.encoder
    hidden = _by_strips(encoder.conv_in, device, pixels.to(_HOME))
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            hidden = _resnet(resnet, hidden, device)
        for downsampler in block.downsamplers or ():
            hidden = _halved(downsampler, device, hidden)
    hidden = encoder.mid_block(hidden.to(device))
    moments = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(hidden)))
    return DiagonalGaussianDistribution(moments if vae.quant_conv is None else vae.quant_conv(moments))


def _resnet(resnet: Any, hidden: Tensor, device: torch.device) -> Tensor:
    """diffusers' ``ResnetBlock2D`` as VAEs have it: without timesteps, resizing or dropout."""
    shortcut = resnet.conv_shortcut or nn.Identity()
    first = _whole_norm(resnet.norm1, hidden, device)
    inner = _by_strips(lambda strip: resnet.conv1(resnet.nonlinearity(first(strip))), device, hidden)
    second = _whole_norm(resnet.norm2, inner, device)

    def rest(strip: Tensor, residual: Tensor) -> Tensor:
        changed = resnet.conv2(resnet.nonlinearity(second(strip)))
        return (shortcut(residual) + changed) / resnet.output_scale_factor

    return _by_strips(rest, device, inner, hidden)


def _by_strips(function: Callable[..., Tensor], device: torch.device, *wholes: Tensor) -> Tensor:
    """``function`` of all ``wholes``, where a row of its result depends on no row but its neighbours."""
    height, made = wholes[0].shape[2], None
    for top, bottom in _strips(wholes[0]):
        above, below = min(1, top), min(1, height - bottom)
        part = function(*(whole[:, :, top - above : bottom + below].to(device) for whole in wholes))
        scale = part.shape[2] // (bottom - top + above + below)
        part = part[:, :, above * scale : part.shape[2] - below * scale]
        if made is None:
            made = torch.empty((*part.shape[:2], height * scale, part.shape[3]), dtype=part.dtype, device=_HOME)
        made[:, :, top * scale : bottom * scale] = part
    assert made is not None
    return made


def _halved(function: Callable[[Tensor], Tensor], device: torch.device, whole: Tensor) -> Tensor:
    """``function`` of ``whole``, where a row of its result depends on two rows and the one below.

    diffusers' ``Downsample2D`` adds a row of zeros below, which a strip that has the next row does not reach.
    """
    strips = _strips(whole, multiple=2)
    return torch.cat([function(whole[:, :, top : bottom + 1].to(device)).to(_HOME) for top, bottom in strips], 2)


def _whole_norm(norm: nn.GroupNorm, hidden: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """``norm`` with mean and variance of all of ``hidden``, to be applied to a strip of it (Wu & He 2018)."""
    means, variances, shares = [], [], []
    for top, bottom in _strips(hidden):
        groups = hidden[:, :, top:bottom].to(device).float().unflatten(1, (norm.num_groups, -1))
        means.append(groups.mean((2, 3, 4)))
        variances.append(groups.var((2, 3, 4), correction=0))
        shares.append((bottom - top) / hidden.shape[2])
    mean = torch.stack([share * part for share, part in zip(shares, means, strict=True)]).sum(0)
    spreads = [v + (m - mean).square() for v, m in zip(variances, means, strict=True)]
    variance = torch.stack([share * spread for share, spread in zip(shares, spreads, strict=True)]).sum(0)
    per_channel = hidden.shape[1] // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(per_channel, 1) * norm.weight.float()
    shift = norm.bias.float() - mean.repeat_interleave(per_channel, 1) * scale
    return lambda strip: (strip.float() * scale[..., None, None] + shift[..., None, None]).to(strip.dtype)


def _strips(whole: Tensor, *, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """First row, and the row after the last, of each strip of ``whole``, (b, c, h, w), from multiples of ``multiple`` on."""
    images, channels, height, width = whole.shape
    rows = max(1, STRIP_VALUES // (images * channels * width) // multiple) * multiple
    for top in range(0, height, rows):
        yield top, min(top + rows, height)
