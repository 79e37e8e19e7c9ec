"""The optimizer's step: clipped, guarded against non-finite gradients, and all on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.sections import OptimizerSection

BETAS = (0.9, 0.99)
"""AdamW's decay rates of the means of gradients and of their squares (Kingma & Ba 2015, algorithm 1)."""


def rate_factor(step: int, section: OptimizerSection, *, steps: int) -> float:
    """Factor of the learning rates at ``step`` (from 0) of ``steps``: linear warm-up, then the schedule."""
    if step < section.warmup_steps:
        return (step + 1) / (section.warmup_steps + 1)
    progress = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    if section.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if section.schedule == "linear" else 1.0


class GuardedAdamW:
    """AdamW (Loshchilov & Hutter 2019) over flat parameters, each with its own learning rate.

    A step whose gradients hold NaN or Inf changes nothing and is counted. Nothing here waits for the device, except
    ``skipped_steps``.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], rates: Sequence[float], section: OptimizerSection, *, steps: int
    ):
        groups = [{"params": [p], "lr": torch.tensor(0.0, device=p.device)} for p in parameters]
        self._rates, self._section, self._steps = tuple(rates), section, steps
        self._adam = torch.optim.AdamW(groups, betas=BETAS, weight_decay=section.weight_decay, fused=True)
        self._parameters = list(parameters)
        self._skipped = torch.zeros((), device=parameters[0].device)

    def scaled(self, loss: Tensor) -> Tensor:
        """What to start a backward pass from."""
        return loss

    def step(self, step: int, accelerator: Accelerator | None = None) -> None:
        """Apply the parameters' gradients at the rates of ``step`` (from 0), clipped to ``max_grad_norm`` together.

        With several processes, ``accelerator`` first sums their gradients.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if accelerator is not None and accelerator.num_processes > 1:
            for gradient in gradients:
                gradient.copy_(accelerator.reduce(gradient, "sum"))
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        finite = norm.isfinite()
        clip = (self._section.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, clip)
        factor = rate_factor(step, self._section, steps=self._steps)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"].fill_(rate * factor)
        # The fused kernel leaves parameters and moments unchanged where found_inf is 1.
        setattr(self._adam, "found_inf", (~finite).float())  # noqa: B010
        self._adam.step()
        self._skipped += ~finite

    def skipped_steps(self) -> int:
        """Number of steps skipped so far; waits for the device."""
        return int(self._skipped.item())

    def state(self) -> dict[str, Tensor]:
        """Every tensor that ``restore`` needs, by name; views of the live tensors, on the device."""
        tensors = {"skipped": self._skipped}
        for i, parameter in enumerate(self._parameters):
            tensors[f"parameter.{i}"] = parameter.detach()
            for name, tensor in self._adam.state[parameter].items():
                tensors[f"{name}.{i}"] = tensor
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Raises ``KeyError`` or ``RuntimeError`` where the tensors do not fit."""
        self._skipped.copy_(tensors["skipped"])
        for i, parameter in enumerate(self._parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
            self._adam.state[parameter] = {
                name: tensors[f"{name}.{i}"].to(parameter.device).clone() for name in ("step", "exp_avg", "exp_avg_sq")
            }
