"""Choose the modules that a LoRA changes, put trainable layers in their places, and take them out again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .attaching import put_in_place
from .layers import LoraLinear
from .low_rank import LowRank
from .quantized import FrozenLinear, QuantizedLinear

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
TARGETS = {"attention": ATTENTION, "attention-mlp": ATTENTION + FEED_FORWARD}
"""Value of ``lora.targets`` -> endings of the names of the modules that it means."""


def choose_targets(modules: Mapping[str, nn.Module], targets: str) -> dict[str, FrozenLinear]:
    """The linear modules of ``modules`` (canonical name -> module) that ``targets``, a key of ``TARGETS``, means; sorted."""
    endings = tuple(f".{ending}" for ending in TARGETS[targets])
    return {
        name: module
        for name, module in sorted(modules.items())
        if isinstance(module, FrozenLinear) and name.endswith(endings)
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _WorkingCopy:
    """What the layers of a group compute with, in the base's dtype, flat.

    In float32 both are the memory of the master and of its gradient; otherwise they are copies.
    """

    values: Tensor
    gradients: Tensor


class Adapter:
    """Trainable low-rank layers in the places of frozen ones.

    All matrices of a group are views of one flat buffer, so gradient clipping, the optimizer and a reduction over
    processes are a single operation each, whatever the number of modules. ``parameters`` are float32 masters; if the
    base computes in another dtype, the layers use a copy in that dtype, made once in each step.
    """

    def __init__(self, groups: Sequence[Mapping[str, FrozenLinear]], *, rank: int, alpha: float, seed: int):
        """Make a fresh adapter: down matrices random, as a function of (``seed``, name), up matrices zero.

        Each of ``groups`` (canonical name -> frozen module) becomes one flat float32 entry of ``parameters``, of
        Σ rank · (in + out) values. The change of a module is ``alpha`` / ``rank`` · up @ down.
        """
        self.alpha = alpha
        self.parameters: list[nn.Parameter] = []
        self._working_copies: list[_WorkingCopy] = []
        self._masters: dict[str, tuple[Tensor, Tensor]] = {}
        """Canonical name -> (rank, in) and (out, rank) views of the masters."""
        self._layers: dict[str, LoraLinear] = {}
        self._frozen: dict[str, FrozenLinear] = {}
        for group in groups:
            self._add_group(group, rank, seed)

    def _add_group(self, group: Mapping[str, FrozenLinear], rank: int, seed: int) -> None:
        first = next(iter(group.values()))
        like = first if isinstance(first, QuantizedLinear) else first.weight
        total = sum(rank * (module.in_features + module.out_features) for module in group.values())
        master = nn.Parameter(torch.zeros(total, device=like.device))
        master.grad = torch.zeros_like(master)
        working = _WorkingCopy(values=master.detach(), gradients=master.grad)
        if like.dtype != master.dtype:
            working = _WorkingCopy(
                values=torch.zeros_like(master.detach(), dtype=like.dtype),
                gradients=torch.zeros_like(master.grad, dtype=like.dtype),
            )
        self.parameters.append(master)
        self._working_copies.append(working)
        position = 0
        for name, module in group.items():
            leaves, masters, gradients = [], [], []
            for rows, columns in ((rank, module.in_features), (module.out_features, rank)):
                span = slice(position, position + rows * columns)
                leaves.append(working.values[span].view(rows, columns).requires_grad_())
                gradients.append(working.gradients[span].view(rows, columns))
                masters.append(master.detach()[span].view(rows, columns))
                position = span.stop
            down, up = leaves
            down_master, up_master = masters
            down_master.copy_(_kaiming_uniform(down.shape, seed, name))
            self._masters[name] = (down_master, up_master)
            self._layers[name] = LoraLinear(module, down, up, self.alpha / rank, gradients=(gradients[0], gradients[1]))
            self._frozen[name] = module

    @torch.no_grad()
    def begin_step(self) -> None:
        """Copy the masters to the layers, and clear the gradients."""
        for master, working in zip(self.parameters, self._working_copies, strict=True):
            working.gradients.zero_()
            if working.values.dtype != master.dtype:
                working.values.copy_(master)
                if master.grad is not None:
                    master.grad.zero_()

    def end_backward(self) -> None:
        """Add the gradients of the layers to those of the masters, and clear them; once after each backward pass."""
        for master, working in zip(self.parameters, self._working_copies, strict=True):
            if working.gradients.dtype == master.dtype:
                master.grad = working.gradients
                continue
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
            master.grad.add_(working.gradients)
            working.gradients.zero_()

    def attach(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the trainable layers in place; ``modules`` maps every canonical name, parents too, to its module."""
        put_in_place(modules, self._layers)

    def detach(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the frozen modules back: the exact inverse of ``attach``."""
        put_in_place(modules, self._frozen)

    def weights(self) -> dict[str, LowRank]:
        """Canonical name -> a copy of the trained matrices, (rank, in) and (out, rank) float32, on the CPU."""
        return {
            name: LowRank(down=down.cpu().clone(), up=up.cpu().clone(), alpha=self.alpha)
            for name, (down, up) in self._masters.items()
        }


def _kaiming_uniform(shape: torch.Size, seed: int, name: str) -> Tensor:
    """(rank, in) float32 from U(-1/√in, 1/√in), as ``kaiming_uniform_(a=√5)`` (He et al. 2015): by (seed, name) alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    bound = 1 / math.sqrt(shape[1])
    values = np.random.Generator(np.random.Philox(key=key)).uniform(-bound, bound, tuple(shape))
    return torch.from_numpy(values.astype(np.float32))
