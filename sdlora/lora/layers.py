"""A linear layer with a trainable low-rank change beside its frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Dᵀ) Uᵀ, with the products added in place and nothing but x and x Dᵀ kept.

    x (n, in), W (out, in), D (rank, in), U (out, rank). The gradients of the frozen W and b are not formed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float):
        down_, up_ = down.to(x.dtype), up.to(x.dtype)
        hidden = x @ down_.T
        y = F.linear(x, weight, bias).addmm_(hidden, up_.T, alpha=scale)
        ctx.save_for_backward(x, hidden, weight, down_, up_)
        ctx.scale, ctx.master = scale, down.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (gy,) = gradients
        x, hidden, weight, down, up = ctx.saved_tensors
        g_hidden = (gy @ up).mul_(ctx.scale)
        g_up = (gy.T @ hidden).mul_(ctx.scale).to(ctx.master)
        g_down = (g_hidden.T @ x).to(ctx.master)
        g_x = (gy @ weight).addmm_(g_hidden, down) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_down, g_up, None


class LoraLinear(nn.Module):
    """``base`` is frozen; ``down`` (rank, in) and ``up`` (out, rank) are trained, in float32 whatever the base's dtype."""

    def __init__(self, base: nn.Linear, down: nn.Parameter, up: nn.Parameter, scale: float):
        super().__init__()
        self.base, self.down, self.up, self.scale = base, down, up, scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        y = _LowRankLinear.apply(flat, self.base.weight, self.base.bias, self.down, self.up, self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])
