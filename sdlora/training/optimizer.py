"""The optimizer's step: clipped, guarded against non-finite gradients, and all on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.sections import OptimizerSection
from .adamw import adamw
from .loss_scale import LossScale
from .rates import rate_factor

MOMENTS = 2
"""Values that the optimizer remembers of each parameter, float32: the means of gradients and of their squares."""


class GuardedAdamW:
    """AdamW (Loshchilov & Hutter 2019) over flat float32 parameters, each with its own learning rate.

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
        lengths: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ):
        """``lengths`` are the numbers of steps in which each parameter is trained, by default in all ``steps``.

        ``dtype`` is that in which the gradients are computed; for float16 the loss is scaled.
        """
        self._rates, self._section, self._steps = tuple(rates), section, steps
        self._adam = adamw(parameters, section)
        self._parameters = list(parameters)
        self._ends = {p: end for p, end in zip(parameters, lengths, strict=False) if end < steps}
        self._skipped = torch.zeros((), device=parameters[0].device)
        self._scale = LossScale(parameters[0].device) if dtype == torch.float16 else None

    def scaled(self, loss: Tensor) -> Tensor:
        """What to differentiate instead of ``loss``, () float32: in float16 its product with the loss scale.

        ``step`` divides the gradients by the same scale.
        """
        return loss if self._scale is None else loss * self._scale.value

    def step(self, step: int, accelerator: Accelerator | None = None) -> None:
        """Apply the parameters' gradients at the rates of ``step`` (from 0), clipped to ``max_grad_norm`` together.

        With several processes, known from ``accelerator``, their gradients are first summed in place.
        """
        for parameter, end in self._ends.items():
            if step >= end:
                parameter.grad = None
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if accelerator is not None and accelerator.num_processes > 1:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        finite = norm.isfinite()
        if self._scale is not None:
            norm = norm / self._scale.value
        factor = (self._section.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if self._scale is not None:
            factor = factor / self._scale.value
        torch._foreach_mul_(gradients, factor)
        rate = rate_factor(step, self._section, steps=self._steps)
        self._adam.update([each * rate for each in self._rates], finite)
        self._skipped += ~finite
        if self._scale is not None:
            self._scale.update(finite)

    def skipped_steps(self) -> int:
        """Number of steps skipped so far; waits for the device."""
        return int(self._skipped.item())

    def settling_steps(self) -> int:
        """How many of the skipped steps only lowered the loss scale, which is no fault of the run; waits for the device."""
        return 0 if self._scale is None else int(self._scale.drops.item())

    def state(self) -> dict[str, Tensor]:
        """Every tensor that ``restore`` needs, by name; views of the live tensors, on the device."""
        tensors = {"skipped": self._skipped}
        for i, parameter in enumerate(self._parameters):
            tensors[f"parameter.{i}"] = parameter.detach()
            for name, tensor in self._adam.state[parameter].items():
                tensors[f"{name}.{i}"] = tensor
        return tensors if self._scale is None else tensors | self._scale.state()

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Raises ``KeyError`` or ``RuntimeError`` where the tensors do not fit.

        A loss scale is restored where both sides have one.
        """
        self._skipped.copy_(tensors["skipped"])
        for i, parameter in enumerate(self._parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
            self._adam.state[parameter] = {
                name: tensors[f"{name}.{i}"].to(parameter.device).clone() for name in ("step", "exp_avg", "exp_avg_sq")
            }
        if self._scale is not None:
            self._scale.restore(tensors)
