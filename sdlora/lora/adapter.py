"""Choose the modules that a LoRA changes, put trainable layers in their places, and take them out again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .layers import LoraLinear
from .low_rank import LowRank

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

    All matrices of a group are views of one flat buffer, so that clipping, the optimizer and a reduction over processes
    are a single operation each, whatever the number of modules. ``parameters`` are float32 masters; where the base
    computes in another dtype, the layers see a copy in that dtype, made once a step.
    """

    def __init__(self, groups: Sequence[Mapping[str, nn.Linear]], *, rank: int, alpha: float, seed: int):
        """``groups`` are canonical name -> module; each becomes one entry of ``parameters``."""
        self.alpha = alpha
        self.parameters: list[nn.Parameter] = []
        self._working: list[tuple[Tensor, Tensor]] = []
        self._spans: dict[str, tuple[Tensor, Tensor]] = {}
        self._layers: dict[str, LoraLinear] = {}
        self._frozen: dict[str, nn.Linear] = {}
        for group in groups:
            self._add_group(group, rank, seed)

    def _add_group(self, group: Mapping[str, nn.Linear], rank: int, seed: int) -> None:
        weight = next(iter(group.values())).weight
        total = sum(rank * (module.in_features + module.out_features) for module in group.values())
        master = nn.Parameter(torch.zeros(total, device=weight.device))
        master.grad = torch.zeros_like(master)
        values, gradients = master.detach(), master.grad
        if weight.dtype != master.dtype:
            values, gradients = (torch.zeros_like(values, dtype=weight.dtype) for _ in range(2))
        self.parameters.append(master)
        self._working.append((values, gradients))
        position = 0
        for name, module in group.items():
            leaves = []
            for shape in ((rank, module.in_features), (module.out_features, rank)):
                span = slice(position, position + shape[0] * shape[1])
                leaf = values[span].view(shape).requires_grad_()
                leaf.grad = gradients[span].view(shape)
                leaves.append((leaf, master.detach()[span].view(shape)))
                position = span.stop
            (down, down_master), (up, up_master) = leaves
            down_master.copy_(_kaiming_uniform(down.shape, seed, name))
            self._spans[name] = (down_master, up_master)
            self._layers[name] = LoraLinear(module, down, up, self.alpha / rank)
            self._frozen[name] = module

    @torch.no_grad()
    def begin_step(self) -> None:
        """Show the layers the masters as they are now, and clear the gradients."""
        for master, (values, gradients) in zip(self.parameters, self._working, strict=True):
            if values.dtype != master.dtype:
                values.copy_(master)
            gradients.zero_()

    def end_backward(self) -> None:
        """Hand the gradients of the layers to the masters."""
        for master, (_, gradients) in zip(self.parameters, self._working, strict=True):
            if master.grad is not None and gradients.dtype != master.dtype:
                master.grad.copy_(gradients)

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

    def weights(self) -> dict[str, LowRank]:
        """Canonical name -> a copy of the trained matrices, float32 on the CPU."""
        return {
            name: LowRank(down=down.cpu().clone(), up=up.cpu().clone(), alpha=self.alpha)
            for name, (down, up) in self._spans.items()
        }


def _kaiming_uniform(shape: torch.Size, seed: int, name: str) -> Tensor:
    """U(-1/√in, 1/√in), as ``kaiming_uniform_(a=√5)`` (He et al. 2015), a function of (seed, name) alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    bound = 1 / math.sqrt(shape[1])
    values = np.random.Generator(np.random.Philox(key=key)).uniform(-bound, bound, tuple(shape))
    return torch.from_numpy(values.astype(np.float32))
