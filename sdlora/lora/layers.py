"""A linear layer with a trainable low-rank change beside its frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Dᵀ) Uᵀ, in three products forwards and five backwards, with nothing but x and x Dᵀ kept.

    x (n, in), W (out, in), D (rank, in), U (out, rank), all of one dtype. The gradients of D and U are added to their
    ``.grad`` in place, which spares a temporary and an addition each; those of the frozen W and b are not formed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float):
        hidden = x @ down.T
        ctx.save_for_backward(x, hidden, weight, down, up)
        ctx.scale, ctx.gradients = scale, (down.grad, up.grad)
        return F.linear(x, weight, bias).addmm_(hidden, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor):
        (gy,) = outer
        x, hidden, weight, down, up = ctx.saved_tensors
        g_down, g_up = ctx.gradients
        g_hidden = torch.addmm(hidden, gy, up, beta=0, alpha=ctx.scale)
        g_up.addmm_(gy.T, hidden, alpha=ctx.scale)
        g_down.addmm_(g_hidden.T, x)
        g_x = (gy @ weight).addmm_(g_hidden, down) if ctx.needs_input_grad[0] else None
        return g_x, None, None, None, None, None


class LoraLinear(nn.Module):
    """``base`` (frozen) plus ``scale`` · ``up`` @ ``down``.

    ``down`` (rank, in) and ``up`` (out, rank) are leaves of the base's dtype that require gradients; a backward pass adds
    to their ``.grad``, which is made here where it is missing.
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = down, up
        for leaf in (down, up):
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        y = _LowRankLinear.apply(flat, self.base.weight, self.base.bias, self.down, self.up, self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])
