"""The optimizer's step: clipped, guarded against non-finite gradients, and all on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.sections import OptimizerSection
from .length import Length
from .loss_scale import LossScale
from .optimizers.adamw import adamw
from .optimizers.algorithm import Algorithm
from .optimizers.ema import MovingAverage
from .optimizers.library import LibraryOptimizer, Shapes
from .processes import add_up
from .rates import rate_factor


class GuardedAdamW:
    """The optimizer of ``section`` over flat float32 parameters, each with its own learning rate.

    A step whose gradients hold NaN or Inf changes nothing and is counted. Nothing here waits for the device, except
    ``skipped_steps`` and ``settling_steps``.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        rates: Sequence[float],
        section: OptimizerSection,
        *,
        steps: int,
        earlier: Sequence[int] = (),
        lengths: Sequence[int] = (),
        shapes: Shapes | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        after_update: Callable[[], None] | None = None,
    ):
        """``earlier`` are the lengths that the run had before each extension to ``steps``; see ``Length``.

        ``lengths`` are the numbers of steps in which each parameter is trained, by default in all ``steps``.

        ``shapes`` are those of the tensors within each parameter, by default itself. ``dtype`` is that in which the
        gradients are computed; for float16 the loss is scaled. ``seed`` is that of optimizers that draw random numbers.
        ``after_update`` changes the parameters in place after each step; averages are taken after it.

        Raises:
            ConfigError: the optimizer cannot be used; see ``check_optimizer``.
        """
        self._rates, self._section = tuple(rates), section
        self._length = Length(ends=(*earlier, steps))
        self._parameters = list(parameters)
        self._algorithm: Algorithm = (
            adamw(parameters, section)
            if section.name == "adamw"
            else LibraryOptimizer(parameters, shapes or [[p.shape] for p in parameters], section, seed=seed)
        )
        self._ends = {p: end for p, end in zip(parameters, lengths, strict=False) if end < steps}
        self._skipped = torch.zeros((), device=parameters[0].device)
        self._scale = LossScale(parameters[0].device) if dtype == torch.float16 else None
        self._after_update = after_update
        self._average = MovingAverage(parameters, section.ema) if section.ema else None

    def scaled(self, loss: Tensor) -> Tensor:
        """What to differentiate instead of ``loss``, () float32: in float16 its product with the loss scale.

        ``step`` divides the gradients by the same scale.
        """
        return loss if self._scale is None else loss * self._scale.value

    def step(self, step: int, accelerator: Accelerator | None = None) -> None:
        """Apply the parameters' gradients at the rates of ``step`` (from 0), clipped to ``max_grad_norm`` together.

        A limit of 0 is none. With several processes, known from ``accelerator``, their gradients are first summed in place.
        """
        for parameter, end in self._ends.items():
            if step >= end:
                parameter.grad = None
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if accelerator is not None and accelerator.num_processes > 1:
            for gradient in gradients:
                add_up(gradient)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        finite = norm.isfinite()
        if self._scale is not None:
            norm = norm / self._scale.value
        factor = ((self._section.max_grad_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0)
        if self._scale is not None:
            factor = factor / self._scale.value
        torch._foreach_mul_(gradients, factor)
        rate = rate_factor(step, self._section, steps=self._length.in_force(step))
        self._algorithm.update([each * rate for each in self._rates], finite)
        if self._after_update is not None:
            self._after_update()
        if self._average is not None:
            self._average.update(step, finite)
        self._skipped += ~finite
        if self._scale is not None:
            self._scale.update(finite)

    def skipped_steps(self) -> int:
        """Number of steps skipped so far; waits for the device."""
        return int(self._skipped.item())

    def settling_steps(self) -> int:
        """How many of the skipped steps only lowered the loss scale, which is no fault of the run; waits for the device."""
        return 0 if self._scale is None else int(self._scale.drops.item())

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Within the block the parameters have the values that are kept: an average where there is one, else their own.

        After it they have their own again, to the bit.
        """
        kept = self._algorithm.averages() if self._average is None else self._average.values
        if kept is None:
            yield
            return
        parameters = [parameter.detach() for parameter in self._parameters]
        own = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, kept)
        if self._after_update is not None:
            self._after_update()
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that ``restore`` needs, by name; on the device, and mostly views of the live tensors."""
        tensors = {"skipped": self._skipped, **self._algorithm.state()}
        tensors |= {f"parameter.{i}": parameter.detach() for i, parameter in enumerate(self._parameters)}
        for part in (self._average, self._scale):
            tensors |= {} if part is None else part.state()
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Raises ``KeyError`` or ``RuntimeError`` where the tensors do not fit.

        A loss scale is restored where both sides have one.
        """
        self._skipped.copy_(tensors["skipped"])
        for i, parameter in enumerate(self._parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
        self._algorithm.restore(tensors)
        for part in (self._average, self._scale):
            if part is not None:
                part.restore(tensors)
