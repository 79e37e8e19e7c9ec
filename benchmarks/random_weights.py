"""Random weights for models of the published sizes."""

from __future__ import annotations

import torch
from torch import nn

from sdlora.base.base import Base


@torch.no_grad()
def fill_randomly(model: nn.Module) -> None:
    """Weights that keep activations about 1: std 1/√inputs; scales of norms at 1, biases at 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02 if "embedding" in name else parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def fill_base_randomly(base: Base) -> None:
    """``fill_randomly`` of every model of ``base``, the same each time."""
    torch.manual_seed(0)
    for model in (base.unet, base.vae, *base.encoder_models()):
        fill_randomly(model)
