"""Trainable layers in the places of frozen ones, on flat buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from .attaching import put_in_place
from .change import Change
from .dropout import AdapterDropout, DropoutRates
from .max_norm import limit_norm
from .trainable import Trainable

Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True, kw_only=True, eq=False)
class _WorkingCopy:
    """What the layers of a group compute with, in the base's dtype, flat.

    In float32 both are the memory of the master and of its gradient; otherwise they are copies.
    """

    values: Tensor
    gradients: Tensor


class Adapter(Generic[Group]):
    """Trainable layers in the places of frozen ones.

    All tensors of a group are views of one flat buffer, so gradient clipping, the optimizer and a reduction over
    processes are a single operation each, whatever the number of modules. ``parameters`` are float32 masters; if the
    base computes in another dtype, the layers use a copy in that dtype, made once in each step.
    """

    def __init__(
        self,
        trainables: Mapping[str, Trainable],
        *,
        seed: int,
        group_of: Callable[[str, str], Group],
        dropout: AdapterDropout | None = None,
    ):
        """Make a fresh adapter; the start values are a function of ``seed`` and the names.

        Args:
            trainables: canonical name -> what is trained of that module.
            seed: of the start values.
            group_of: the group of a tensor, by the canonical name of its module and its own. Each group is one flat float32
                entry of ``parameters``; ``groups`` has them in the same order, in which they first occur.
            dropout: that of ``trainables``; by default they have none.
        """
        members: dict[Group, list[tuple[str, str]]] = {}
        for name, trainable in trainables.items():
            for tensor in trainable.shapes:
                members.setdefault(group_of(name, tensor), []).append((name, tensor))
        self._trainables = dict(trainables)
        self.dropout = dropout or AdapterDropout(DropoutRates())
        self.groups = tuple(members)
        self.parameters: list[nn.Parameter] = []
        self.shapes: list[list[tuple[int, ...]]] = []
        """Shapes of the tensors within each of ``parameters``, in order."""
        self._working_copies: list[_WorkingCopy] = []
        self._masters: dict[str, dict[str, Tensor]] = {name: {} for name in trainables}
        """Canonical name -> views of the masters, by the names of the tensors."""
        leaves: dict[str, dict[str, Tensor]] = {name: {} for name in trainables}
        gradients: dict[str, dict[str, Tensor]] = {name: {} for name in trainables}
        for tensors in members.values():
            self._add_group(tensors, leaves, gradients)
        for name, trainable in trainables.items():
            for tensor, values in trainable.start(name, seed).items():
                self._masters[name][tensor].copy_(values)
        self._layers = {name: each.layer(leaves[name], gradients[name]) for name, each in trainables.items()}

    def _add_group(
        self,
        tensors: list[tuple[str, str]],
        leaves: dict[str, dict[str, Tensor]],
        gradients: dict[str, dict[str, Tensor]],
    ) -> None:
        like = self._trainables[tensors[0][0]].like
        shapes = [self._trainables[name].shapes[tensor] for name, tensor in tensors]
        master = nn.Parameter(torch.zeros(sum(map(math.prod, shapes)), device=like.device))
        master.grad = torch.zeros_like(master)
        working = _WorkingCopy(values=master.detach(), gradients=master.grad)
        if like.dtype != master.dtype:
            working = _WorkingCopy(
                values=torch.zeros_like(master.detach(), dtype=like.dtype),
                gradients=torch.zeros_like(master.grad, dtype=like.dtype),
            )
        self.parameters.append(master)
        self.shapes.append(shapes)
        self._working_copies.append(working)
        position = 0
        for (name, tensor), shape in zip(tensors, shapes, strict=True):
            span = slice(position, position + math.prod(shape))
            leaves[name][tensor] = working.values[span].view(shape).requires_grad_()
            gradients[name][tensor] = working.gradients[span].view(shape)
            self._masters[name][tensor] = master.detach()[span].view(shape)
            position = span.stop

    @property
    def fixed(self) -> dict[str, Tensor]:
        """By name, what layers compute with besides what is trained: the live tensors, contiguous, of the layers' dtype.

        A part of the state of a run, since another device or machine would make others: signs of singular vectors are free,
        and those of near values mix. The trained differences mean nothing beside other factors.
        """
        return {
            f"fixed.{name}.{key}": tensor
            for name, trainable in self._trainables.items()
            for key, tensor in trainable.fixed.items()
        }

    @torch.no_grad()
    def restore_fixed(self, tensors: Mapping[str, Tensor]) -> None:
        """Give ``fixed`` the values that it has in ``tensors``; what these lack, as in states of earlier versions, stays."""
        for name, tensor in self.fixed.items():
            if name in tensors:
                tensor.copy_(tensors[name])

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

    def limit_norms(self, most: float) -> None:
        """Scale the masters of each module whose ‖ΔW‖ is more than ``most`` down to that; see ``limit_norm``."""
        for name, masters in self._masters.items():
            limit_norm(self._trainables[name].change(masters), most)

    def attach(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the trainable layers in place; ``modules`` maps every canonical name, parents too, to its module."""
        put_in_place(modules, self._layers)

    def detach(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the frozen modules back: the exact inverse of ``attach``."""
        put_in_place(modules, {name: trainable.module for name, trainable in self._trainables.items()})

    def changes(self) -> dict[str, Change]:
        """Canonical name -> the trained change, of copies of its tensors, float32 on the CPU."""
        return {
            name: self._trainables[name].change({each: tensor.cpu().clone() for each, tensor in tensors.items()})
            for name, tensors in self._masters.items()
        }
