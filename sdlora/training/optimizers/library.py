"""Any optimizer with torch's interface, guarded from outside."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...config.optimizer_section import OptimizerSection
from ...randomness import Stream, generator
from .choice import LibraryChoice, choose
from .state_tree import packed, tensors_in, unpacked

Shapes = Sequence[Sequence[tuple[int, ...]]]
"""For each flat parameter, the shapes of the tensors that it consists of, in order."""


class LibraryOptimizer:
    """An optimizer of another package, one instance for each flat parameter, so that rates are each parameter's own.

    Instances that look at matrices get views of the parameter in the shapes of its tensors, others the whole of it.

    A broken gradient is replaced by zeros, so that NaN can reach no number that an instance keeps in main memory; parameters
    and tensors are copied before each step, and selected with ``torch.where`` after it. What is in main memory, such as a
    count of steps, counts a broken step too.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], shapes: Shapes, section: OptimizerSection, *, seed: int = 0):
        """``seed`` is that of optimizers that draw random numbers.

        Raises:
            ConfigError: there is no such optimizer, its package is not installed, or it does not take the arguments.
        """
        choice = choose(section)
        self._members = [
            _Member(parameter, [(parameter.numel(),)] if choice.elementwise else each, choice)
            for parameter, each in zip(parameters, shapes, strict=True)
        ]
        self._device, self._seed, self._updates = parameters[0].device, seed, 0
        self._draws = choice.draws

    def update(self, rates: Sequence[float], finite: Tensor) -> None:
        """Apply the gradients at ``rates``, one for each parameter; see ``Algorithm``."""
        moved = [(member, rate) for member, rate in zip(self._members, rates, strict=True) if member.trained]
        before = [member.copies() for member, _ in moved]
        try:
            with self._own_random_numbers():
                for member, rate in moved:
                    member.move(rate, finite)
        except BaseException:  # Out of memory, say: the step is done again, or saved as it was before.
            for (member, _), copies in zip(moved, before, strict=True):
                member.take(copies)
            raise
        for (member, _), copies in zip(moved, before, strict=True):
            member.select(finite, copies)
        self._updates += 1

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, and uint8 JSON for the rest."""
        tensors = {"updates": torch.tensor(self._updates)}
        for number, member in enumerate(self._members):
            tensors |= packed(member.state(), f"library.{number}", self._device)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Raises ``KeyError`` where something is missing."""
        self._updates = int(tensors["updates"])
        for number, member in enumerate(self._members):
            member.restore(unpacked(tensors, f"library.{number}", self._device))

    def averages(self) -> list[Tensor] | None:
        """Those of an optimizer that averages its steps, as schedule-free ones do."""
        if not all(hasattr(member.optimizer, "eval") for member in self._members):
            return None
        return [member.average() for member in self._members]

    @contextmanager
    def _own_random_numbers(self) -> Generator[None]:
        """Within the block, torch draws numbers that depend on the seed and the number of updates alone."""
        if not self._draws:
            yield
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(generator(self._seed, Stream.OPTIMIZER, self._updates).integers(2**62)))
            yield


@dataclass(frozen=True, eq=False)
class _Copies:
    """A parameter and its optimizer as they were before a step."""

    value: Tensor
    state: Any


class _Member:
    """One flat parameter and its optimizer."""

    def __init__(self, parameter: nn.Parameter, shapes: Sequence[tuple[int, ...]], choice: LibraryChoice):
        self._parameter = parameter
        self._sizes, self._shapes = [math.prod(shape) for shape in shapes], shapes
        self._views = [nn.Parameter(view) for view in self._split(parameter.detach())]
        self.optimizer = choice.made(self._views)
        self._fresh_groups = [dict(group) for group in self.optimizer.param_groups]

    @property
    def trained(self) -> bool:
        """Whether the parameter has a gradient."""
        return self._parameter.grad is not None

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]

    def copies(self) -> _Copies:
        """What ``take`` and ``select`` need to undo a step."""
        return _Copies(self._parameter.detach().clone(), copy.deepcopy(self.state()))

    @torch.no_grad()
    def move(self, rate: float, finite: Tensor) -> None:
        """A step at ``rate``, with zeros in place of a broken gradient."""
        assert self._parameter.grad is not None
        gradient = self._parameter.grad.masked_fill(~finite, 0.0)
        for view, part in zip(self._views, self._split(gradient), strict=True):
            view.grad = part
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    @torch.no_grad()
    def select(self, finite: Tensor, before: _Copies) -> None:
        """Undo the step on the device where ``finite`` is false; what the first step has made came out of zeros then."""
        self._parameter.copy_(torch.where(finite, self._parameter, before.value))
        earlier = dict(tensors_in(before.state))
        for name, tensor in tensors_in(self.state()):
            # Those beside the device are counts; selecting them would wait for it.
            if name in earlier and earlier[name].shape == tensor.shape and tensor.device == self._parameter.device:
                tensor.copy_(torch.where(finite, tensor, earlier[name]))

    @torch.no_grad()
    def take(self, before: _Copies) -> None:
        """Undo a step, whatever it did."""
        self._parameter.copy_(before.value)
        self.restore(before.state)

    def state(self) -> Any:
        """All that the optimizer has learned, as ``packed`` takes it: by the number of a view, or by name what is of all."""
        numbers: dict[Any, int] = {view: number for number, view in enumerate(self._views)}
        groups = zip(self.optimizer.param_groups, self._fresh_groups, strict=True)
        return {
            "state": {numbers.get(key, key): state for key, state in self.optimizer.state.items()},
            "groups": [_changed(group, fresh) for group, fresh in groups],
        }

    def restore(self, state: Any) -> None:
        """The inverse of ``state``."""
        self.optimizer.state.clear()
        for key, values in state["state"].items():
            self.optimizer.state[self._views[key] if isinstance(key, int) else key] = values
        for group, fresh, values in zip(self.optimizer.param_groups, self._fresh_groups, state["groups"], strict=True):
            group.clear()
            group.update(fresh, **values)

    @torch.no_grad()
    def average(self) -> Tensor:
        """The averaged values; the parameter keeps its own, to the bit."""
        optimizer: Any = self.optimizer
        value = self._parameter.detach().clone()
        optimizer.eval()
        average = self._parameter.detach().clone()
        optimizer.train()
        self._parameter.copy_(value)
        return average


def _changed(group: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """What the steps have put into a group; the rest comes from the arguments, and the learning rate from the schedule."""
    same = {"params", "lr", *(key for key in fresh if group.get(key) is fresh[key])}
    return {key: value for key, value in group.items() if key not in same}
