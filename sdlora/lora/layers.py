"""A linear layer with a trainable low-rank change beside its frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Dᵀ) Uᵀ, in three products forward and five backward; only x and x Dᵀ are kept.

    x (n, in), W (out, in), D (rank, in), U (out, rank), all of the same dtype. The gradients of D and U are added to
    their ``.grad`` in place, which saves a temporary and an addition each. Those of the frozen W and b are not computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float):
        hidden = x @ down.T
        ctx.save_for_backward(x, hidden, weight, down, up)
        ctx.scale, ctx.gradients = scale, (down.grad, up.grad)
        return F.linear(x, weight, bias).addmm_(hidden, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (grad_y,) = grad_outputs
        x, hidden, weight, down, up = ctx.saved_tensors
        grad_down, grad_up = ctx.gradients
        grad_hidden = torch.addmm(hidden, grad_y, up, beta=0, alpha=ctx.scale)
        grad_up.addmm_(grad_y.T, hidden, alpha=ctx.scale)
        grad_down.addmm_(grad_hidden.T, x)
        grad_x = (grad_y @ weight).addmm_(grad_hidden, down) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, None


class LoraLinear(nn.Module):
    """``base`` (frozen) plus ``scale`` · ``up`` @ ``down``.

    ``down`` (rank, in) and ``up`` (out, rank) are leaf tensors of the base's dtype that require gradients. A backward
    pass adds to their ``.grad``, which is created here if it is missing.
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = down, up
        for matrix in (down, up):
            matrix.grad = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the base's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        y = _LowRankLinear.apply(rows, self.base.weight, self.base.bias, self.down, self.up, self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])
