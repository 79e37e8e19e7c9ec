"""Keys of the cache: a digest of everything that decides what the base makes of an image or a caption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ..data.buckets import Placement
from .entries import Kind

_VERSION = 1
"""Raised whenever scaling, cropping, encoding, or the layout of an entry changes."""


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """The name of an entry; made by ``latent_key`` and ``text_key`` alone."""

    kind: Kind
    digest: str
    """SHA-256, lower-case hexadecimal."""


def latent_key(
    *, pixels: str, placement: Placement, flipped: bool, vae: str, dtype: torch.dtype, device: torch.device
) -> CacheKey:
    """Key of an image's latents.

    ``pixels`` is ``ExaminedImage.shown_digest``, ``vae`` the fingerprint of the VAE's encoder and its scale.
    ``dtype`` and the kind of ``device`` are what the VAE computes in and on: both decide how it rounds.
    """
    return _key("latents", [pixels, asdict(placement), flipped, vae, str(dtype), device.type])


def text_key(
    *, ids: Sequence[Tensor], weights: Sequence[Tensor], encoders: str, dtype: torch.dtype, device: torch.device
) -> CacheKey:
    """Key of a caption's embeddings: made from its tokens, so tokenizer, truncation and padding need no mention.

    ``ids`` and ``weights`` hold one (chunks, 77) tensor on the CPU for each text encoder. ``encoders`` is the
    fingerprint of the text encoders and of the layer that is read. ``dtype`` and ``device`` are as in ``latent_key``.
    """
    tokens = [[tensor.tolist() for tensor in tensors] for tensors in (ids, weights)]
    return _key("text", [tokens, encoders, str(dtype), device.type])


def _key(kind: Kind, parts: list[Any]) -> CacheKey:
    text = json.dumps([kind, _VERSION, *parts], sort_keys=True, allow_nan=False)
    return CacheKey(kind=kind, digest=sha256(text.encode()).hexdigest())
