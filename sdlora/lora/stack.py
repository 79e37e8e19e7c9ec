"""The LoRAs on a base: set, weighed, changed with the steps, and removed without a trace."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import CompatibilityError
from .attaching import AttachedLayer, Beside, Factors, can_attach, can_merge, put_in_place
from .change import Change
from .low_rank import LowRank
from .merging import MergedModule, Weighted

Lora = Mapping[str, Weighted]
"""Canonical module name -> (change, weight)."""
_Part = tuple[Change, float, int | None]
"""A change of a module, its weight, and the number of the factor that the weight is multiplied by in each step."""


class Stack:
    """Puts LoRAs on the modules of a base, and keeps what is pristine of those that it touched.

    Each module's weight is W + Σ w · ΔW, summed in float32 and rounded once, in the memory of the weight: no cost in a step,
    whatever the number of LoRAs. Where a weight cannot take a sum, since it is quantised or offloaded, and for weights that
    change with the steps, the changes are computed beside the layer, all low-rank ones as one pair of matrices.

    Only modules whose changes differ from those before are computed again. Memory is held for the pristine weights of the
    modules that are changed at present, in main memory.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        """``modules`` maps every canonical name, parents too, to its module."""
        self._modules = modules
        self._merged: dict[int, MergedModule] = {}
        """By the weight's identity: modules may share one."""
        self._beside: dict[str, Beside] = {}
        self._parts: dict[str, tuple[_Part, ...]] = {}
        self._factors = Factors(0)

    @property
    def touched(self) -> frozenset[str]:
        """Names of the modules that are changed at present."""
        return frozenset(self._parts)

    def set(self, loras: Sequence[Lora], *, varying: Collection[int] = ()) -> None:
        """Put exactly ``loras`` on the modules, whatever was there before.

        ``varying`` are the positions in ``loras`` of those whose weights ``vary`` will change; their factor is 1 until then.
        After an error all is pristine.

        Raises:
            KeyError: a name is not among the modules; RuntimeError: a change does not fit its weight;
            CompatibilityError: a change needs a weight that cannot be read.
        """
        slots = {position: slot for slot, position in enumerate(sorted(varying))}
        parts: dict[str, list[_Part]] = {}
        for position, lora in enumerate(loras):
            for name, (change, weight) in lora.items():
                if weight:
                    parts.setdefault(name, []).append((change, weight, slots.get(position)))
        factors = self._factors
        if len(factors.values) != len(slots):
            # Layers hold the factors that they were made with.
            self._detach(list(self._beside))
            factors = Factors(len(slots))
        factors.set([1.0] * len(slots))
        self._factors, self._parts = factors, {name: tuple(parts[name]) for name in sorted(parts)}
        self._update()

    def vary(self, factors: Sequence[float]) -> None:
        """Multiply the weight of each varying LoRA, in their order, by its factor.

        Low-rank changes follow without any work on a module; a module with another kind of change is merged again.
        Raises as ``set``.
        """
        if tuple(factors) == self._factors.values:
            return
        self._factors.set(factors)
        self._update()

    def restore(self) -> None:
        """Give every weight its pristine bits and every layer its place back."""
        self._parts = {}
        self._detach(list(self._beside))
        for module in self._merged.values():
            module.restore()
        self._merged.clear()

    @torch.no_grad()
    def _update(self) -> None:
        """Change what differs from what is wanted."""
        try:
            merged: dict[int, list[Weighted]] = {}
            owners: dict[int, nn.Module] = {}
            beside: dict[str, Beside] = {}
            for name, parts in self._parts.items():
                module = self._modules[name]
                sums, attached = self._split(name, module, parts)
                if sums:
                    owners.setdefault(id(module.weight), module)
                    merged.setdefault(id(module.weight), []).extend(sums)
                if attached != Beside():
                    beside[name] = attached
            self._merge(owners, merged)
            self._attach(beside)
        except BaseException:
            self.restore()
            raise

    def _split(self, name: str, module: nn.Module, parts: Sequence[_Part]) -> tuple[list[Weighted], Beside]:
        """What is added to the weight, and what is computed beside the layer."""
        mergeable, factors = can_merge(module), self._factors.values
        if not mergeable and not can_attach(module):
            raise CompatibilityError(f"{name}: a {type(module).__name__} whose weight cannot be changed where it is")
        sums: list[Weighted] = []
        low_rank, others = [], []
        for change, weight, slot in parts:
            now = weight if slot is None else weight * factors[slot]
            if isinstance(change, LowRank) and can_attach(module) and (slot is not None or not mergeable):
                low_rank.append((change, weight, slot))
            elif mergeable:
                sums.append((change, now))
            else:
                others.append((change, now))
        return [part for part in sums if part[1]], Beside(low_rank=tuple(low_rank), others=tuple(others))

    def _merge(self, owners: Mapping[int, nn.Module], merged: Mapping[int, list[Weighted]]) -> None:
        for key in self._merged.keys() - merged.keys():
            self._merged.pop(key).restore()
        for key, changes in merged.items():
            if key not in self._merged:
                self._merged[key] = MergedModule(owners[key])
            if self._merged[key].changes != tuple(changes):
                self._merged[key].set(tuple(changes))

    def _attach(self, beside: Mapping[str, Beside]) -> None:
        self._detach([name for name in self._beside if name not in beside])
        for name, wanted in beside.items():
            if self._beside.get(name) != wanted:
                layer = AttachedLayer(self._modules[name], wanted, self._factors)
                put_in_place(self._modules, {name: layer})
                self._beside[name] = wanted

    def _detach(self, names: Sequence[str]) -> None:
        put_in_place(self._modules, {name: self._modules[name] for name in names})
        for name in names:
            del self._beside[name]


@contextmanager
def temporarily_applied(modules: Mapping[str, nn.Module], loras: Sequence[Lora]) -> Generator[None]:
    """Within the block ``loras`` are on ``modules``, as ``Stack.set`` puts them there.

    On leaving, also by an error, all is as before, bit for bit. Raises as ``Stack.set``.
    """
    stack = Stack(modules)
    stack.set(loras)
    try:
        yield
    finally:
        stack.restore()
