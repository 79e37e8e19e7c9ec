"""Choose the modules that a LoRA changes, put trainable layers in their places, and take them out again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from .layers import LoraLinear
from .weights import LowRank

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
TARGETS = {"attention": ATTENTION, "attention-mlp": ATTENTION + FEED_FORWARD}


def choose_targets(modules: Mapping[str, nn.Module], targets: str) -> dict[str, nn.Linear]:
    """The linear modules of ``modules`` (canonical name -> module) that the named set of ``targets`` means, sorted."""
    endings = tuple(f".{ending}" for ending in TARGETS[targets])
    return {
        name: module
        for name, module in sorted(modules.items())
        if isinstance(module, nn.Linear) and name.endswith(endings)
    }


class Adapter:
    """Trainable low-rank layers in the places of frozen ones.

    All matrices are views of one flat float32 parameter per group, so that clipping, the optimizer and a
    reduction over processes are a single operation each, whatever the number of modules.
    """

    def __init__(self, groups: Sequence[Mapping[str, nn.Linear]], *, rank: int, alpha: float, seed: int):
        """``groups`` are canonical name -> module; each becomes one entry of ``parameters``."""
        self.alpha = alpha
        self.parameters: list[nn.Parameter] = []
        self.gradients: list[torch.Tensor] = []
        self._layers: dict[str, LoraLinear] = {}
        self._frozen: dict[str, nn.Linear] = {}
        for group in groups:
            sizes = [rank * (module.in_features + module.out_features) for module in group.values()]
            device = next(iter(group.values())).weight.device
            flat = nn.Parameter(torch.zeros(sum(sizes), device=device))
            flat.grad = gradient = torch.zeros_like(flat)
            self.parameters.append(flat)
            self.gradients.append(gradient)
            for (name, module), data, grad in zip(
                group.items(), flat.detach().split(sizes), gradient.split(sizes), strict=True
            ):
                middle = rank * module.in_features
                down = _view(data[:middle], grad[:middle], (rank, module.in_features))
                up = _view(data[middle:], grad[middle:], (module.out_features, rank))
                down.data.copy_(_kaiming_uniform(down.shape, seed, name))
                self._layers[name] = LoraLinear(module, down, up, alpha / rank)
                self._frozen[name] = module

    def attach(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the trainable layers in place; ``modules`` maps every canonical name, parents too, to its module."""
        self._place(modules, self._layers)

    def detach(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the frozen modules back: the exact inverse of ``attach``."""
        self._place(modules, self._frozen)

    @staticmethod
    def _place(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, layer)

    def zero_grad(self) -> None:
        for gradient in self.gradients:
            gradient.zero_()

    def weights(self) -> dict[str, LowRank]:
        """Canonical name -> a copy of the trained matrices, float32 on the CPU."""
        return {
            name: LowRank(down=_copy(layer.down), up=_copy(layer.up), alpha=self.alpha)
            for name, layer in self._layers.items()
        }


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone()


def _view(data: torch.Tensor, grad: torch.Tensor, shape: tuple[int, int]) -> nn.Parameter:
    parameter = nn.Parameter(data.view(shape))
    parameter.grad = grad.view(shape)
    return parameter


def _kaiming_uniform(shape: torch.Size, seed: int, name: str) -> torch.Tensor:
    """U(-1/√in, 1/√in), as ``kaiming_uniform_(a=√5)`` (He et al. 2015), a function of (seed, name) alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    bound = 1 / math.sqrt(shape[1])
    values = np.random.Generator(np.random.Philox(key=key)).uniform(-bound, bound, tuple(shape))
    return torch.from_numpy(values.astype(np.float32))
