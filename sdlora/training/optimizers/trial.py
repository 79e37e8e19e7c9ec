"""A step of an optimizer on small tensors: whether it works, and what it remembers of each parameter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ...config.optimizer_section import OptimizerSection
from ...errors import ConfigError
from .choice import choose
from .library import LibraryOptimizer

MOMENTS = 2
"""Values that AdamW remembers of each parameter, float32: the means of gradients and of their squares."""
SHAPES = ((16, 320), (320, 16))
"""Shapes of a LoRA's tensors in a common module of SD 1.5."""


@dataclass(frozen=True, kw_only=True)
class OptimizerMemory:
    """What an optimizer holds, as multiples of the parameters' own float32 bytes."""

    state: float
    """What it remembers, and so what a checkpoint has beside the parameters; with the average of ``ema``."""
    copies: float
    """Copies that the guard against broken gradients makes in a step."""

    @property
    def total(self) -> float:
        """All on the device."""
        return self.state + self.copies


@lru_cache(maxsize=16)
def optimizer_memory(section: OptimizerSection) -> OptimizerMemory:
    """What the optimizer of ``section`` holds; that of another package is measured on small tensors.

    Raises:
        ConfigError: the optimizer cannot be used; the message says why.
    """
    average = 1 if section.ema else 0
    if section.name == "adamw":
        return OptimizerMemory(state=MOMENTS + average, copies=0)
    state = _measured(section)
    # Value, gradient and state are copied.
    return OptimizerMemory(state=state + average, copies=2 + state)


def check_optimizer(section: OptimizerSection) -> None:
    """Find out whether the optimizer of ``section`` works, without a model.

    Raises:
        ConfigError: there is no such optimizer, its package is not installed, or it does not take the arguments.
    """
    optimizer_memory(section)


def _measured(section: OptimizerSection) -> float:
    choice = choose(section)
    size = sum(rows * columns for rows, columns in SHAPES)
    flat = nn.Parameter(torch.linspace(-0.1, 0.1, size))
    flat.grad = torch.linspace(-1, 1, size).sin()
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimizer = LibraryOptimizer([flat], [SHAPES], section)
            optimizer.update([1e-3], torch.tensor(True))
            state = optimizer.state()
        except ConfigError:
            raise
        except Exception as error:  # Whatever another package does with arguments that it cannot use.
            stated = f'optimizer.name = "{section.name}"'
            given = ", ".join(f"{key} = {value}" for key, value in section.arguments.items())
            raise ConfigError(
                f"{stated}: {choice.made_by.__name__} cannot do a step"
                f"{f' with optimizer.arguments {given}' if given else ''}: {error or type(error).__name__}"
            ) from None
    if not flat.isfinite().all():
        raise ConfigError(f'optimizer.name = "{section.name}": a step of it produced NaN or Inf')
    sizes = (tensor.nbytes for name, tensor in state.items() if not name.endswith(".json"))
    return sum(sizes) / flat.nbytes
