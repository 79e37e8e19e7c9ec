"""AdamW that leaves out broken steps on the device: torch's fused kernel, and the same in plain operators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config.optimizer_section import OptimizerSection

FUSED_ON = ("cuda", "cpu")
"""Types of device whose fused kernel skips a step where ``found_inf`` is 1.

Metal's ignores it in the versions of torch before https://github.com/pytorch/pytorch/pull/186360.
"""


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over flat parameters, each with its own learning rate."""

    def __init__(self, parameters: Sequence[nn.Parameter], section: OptimizerSection):
        self._parameters, self._settings = list(parameters), section.adamw
        self._moments: dict[Any, dict[str, Tensor]] = {parameter: _fresh_moments(parameter) for parameter in parameters}
        """Made before the first step, so that a step that runs out of memory has changed nothing."""

    def update(self, rates: Sequence[float], finite: Tensor) -> None:
        """See ``Algorithm``."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """``step`` () float32, ``exp_avg`` and ``exp_avg_sq`` of each parameter, with its number; the live tensors."""
        return {
            f"{name}.{number}": tensor
            for number, parameter in enumerate(self._parameters)
            for name, tensor in self._moments[parameter].items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Raises ``KeyError`` where something is missing."""
        for number, parameter in enumerate(self._parameters):
            self._moments[parameter] = {
                name: tensors[f"{name}.{number}"].to(parameter.device).clone() for name in _STATE
            }

    def averages(self) -> None:
        """There are none."""


def adamw(parameters: Sequence[nn.Parameter], section: OptimizerSection) -> AdamW:
    """The fastest AdamW that skips broken steps on the parameters' device."""
    chosen = FusedAdamW if parameters[0].device.type in FUSED_ON else SelectedAdamW
    return chosen(parameters, section)


class FusedAdamW(AdamW):
    """``torch.optim.AdamW`` as one kernel, which reads ``found_inf``."""

    def __init__(self, parameters: Sequence[nn.Parameter], section: OptimizerSection):
        super().__init__(parameters, section)
        groups = [{"params": [p], "lr": torch.tensor(0.0, device=p.device)} for p in parameters]
        values = self._settings
        self._adam = torch.optim.AdamW(
            groups, betas=values.betas, eps=values.epsilon, weight_decay=values.weight_decay, fused=True
        )
        self._adam.state.update(self._moments)
        self._moments = self._adam.state

    def update(self, rates: Sequence[float], finite: Tensor) -> None:
        for group, rate in zip(self._adam.param_groups, rates, strict=True):
            group["lr"].fill_(rate)
        # The fused kernel leaves parameters and moments unchanged where found_inf is 1.
        setattr(self._adam, "found_inf", (~finite).float())  # noqa: B010
        self._adam.step()


class SelectedAdamW(AdamW):
    """The same result in operators that every device has, in float32; new values are selected with ``torch.where``.

    All are computed before the first is written, so that a step that runs out of memory has changed nothing.
    """

    @torch.no_grad()
    def update(self, rates: Sequence[float], finite: Tensor) -> None:
        changes: list[tuple[Tensor, Tensor]] = []
        for parameter, rate in zip(self._parameters, rates, strict=True):
            if parameter.grad is not None:
                changes += self._changes(parameter, parameter.grad, self._moments[parameter], rate, finite)
        for old, new in changes:
            old.copy_(new)

    def _changes(
        self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Tensor], rate: float, finite: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of ``parameter`` and its state, with its new value."""
        first, second = betas = self._settings.betas
        # A broken gradient would make NaN of a moment even where it is not selected.
        gradient = torch.where(finite, gradient, 0.0)
        step = state["step"] + 1
        mean = state["exp_avg"].lerp(gradient, 1 - first)
        square = (state["exp_avg_sq"] * second).addcmul_(gradient, gradient, value=1 - second)
        # 1 - beta**step, exact in float32 for small steps too.
        mean_correction, square_correction = (-torch.expm1(step * math.log(beta)) for beta in betas)
        root = (square.sqrt() / square_correction.sqrt()).add_(self._settings.epsilon)
        moved = parameter * (1 - rate * self._settings.weight_decay) - (mean / root) * (rate / mean_correction)
        pairs = zip((parameter, *(state[name] for name in _STATE)), (moved, step, mean, square), strict=True)
        return [(old, torch.where(finite, new, old)) for old, new in pairs]


_STATE = ("step", "exp_avg", "exp_avg_sq")


def _fresh_moments(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter.detach()),
        "exp_avg_sq": torch.zeros_like(parameter.detach()),
    }
