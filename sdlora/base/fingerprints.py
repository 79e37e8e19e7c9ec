"""Fingerprints of encoders: SHA-256 over all loaded weights, so encoders with different outputs have different ones.

``BaseCheckpoint.fingerprint`` samples the files, which is enough to notice that a run has another base. A cache that
outlives runs needs certainty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import Base

_VAE_ENCODER = ("encoder.", "quant_conv.")
_IRRELEVANT = ("transformers_version", "architectures", "dtype", "torch_dtype")
"""Entries of a model's configuration that do not change what it computes."""


def vae_fingerprint(base: Base) -> str:
    """Fingerprint of the VAE's encoder and latent scale, without the decoder; lower-case hexadecimal."""
    digest = hashlib.sha256(_as_json([dict(base.vae.config), base.checkpoint.latent_scale]))
    _add_weights(digest, base.vae, _VAE_ENCODER)
    return digest.hexdigest()


def text_fingerprint(base: Base) -> str:
    """Fingerprint of the text encoders, in their order, and of the layer that is read; lower-case hexadecimal."""
    checkpoint = base.checkpoint
    digest = hashlib.sha256(_as_json([checkpoint.clip_skip, checkpoint.family.clip_norm]))
    for encoder in base.text_encoders:
        digest.update(_as_json([encoder.facts.part, encoder.facts.pooled, encoder.model.config.to_dict()]))
        _add_weights(digest, encoder.model, ("",))
    return digest.hexdigest()


def _add_weights(digest: Any, model: nn.Module, prefixes: tuple[str, ...]) -> None:
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(_as_json([name, str(tensor.dtype), list(tensor.shape)]))
            digest.update(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _as_json(value: Any) -> bytes:
    return json.dumps(_relevant(value), sort_keys=True, default=str).encode()


def _relevant(value: Any) -> Any:
    """``value`` without irrelevant and private entries, in configurations at any depth."""
    if isinstance(value, Mapping):
        kept = {str(key): entry for key, entry in value.items() if key not in _IRRELEVANT}
        return {key: _relevant(entry) for key, entry in kept.items() if not key.startswith("_")}
    return [_relevant(entry) for entry in value] if isinstance(value, (list, tuple)) else value
