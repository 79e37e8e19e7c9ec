"""A linear layer whose low-rank change is relative to factors that do not change."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .dropout import ModuleDropout
from .layers import hand_over
from .quantized import FrozenLinear, dense_weight


def joined(down: Tensor, up: Tensor, down0: Tensor, up0: Tensor) -> tuple[Tensor, Tensor]:
    """(U₀ + u)(D₀ + d) - U₀ D₀ as one product: [d; D₀], (2 rank, in), and [U₀ + u, u], (out, 2 rank).

    It equals (U₀ + u) d + u D₀. No large terms cancel, as they would in [U₀ + u, -U₀] [D₀ + d; D₀], so half precision
    loses no more of it than of any other product.
    """
    return torch.cat([down, down0]), torch.cat([up0 + up, up], dim=1)


class _AddingRelative(torch.autograd.Function):
    """y = x Wᵀ + b + s ((x dᵀ) (U₀ + u)ᵀ + (x D₀ᵀ) uᵀ), in three products forward and five backward.

    x (n, in), d (rank, in), u (out, rank). The gradients of d and u are added to ``gradients`` in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: FrozenLinear,
        trained: tuple[Tensor, Tensor],
        start: tuple[Tensor, Tensor],
        scale: float,
        gradients: tuple[Tensor, Tensor],
        _down: Tensor,
        _up: Tensor,
    ) -> Tensor:
        down, up = joined(*trained, *start)
        hidden = x @ down.T
        ctx.save_for_backward(x, hidden, down, up)
        ctx.base, ctx.scale, ctx.gradients = base, scale, gradients
        return base(x).addmm_(hidden, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("this layer has no second derivative in its fast form; use RelativeLinear.plain")
        (grad_y,) = grad_outputs
        x, hidden, down, up = ctx.saved_tensors
        grad_down, grad_up = ctx.gradients
        rank = grad_down.shape[0]
        grad_hidden = torch.addmm(hidden, grad_y, up, beta=0, alpha=ctx.scale)
        # u meets x (D₀ + d)ᵀ, d meets U₀ + u.
        grad_up.addmm_(grad_y.T, hidden[:, :rank] + hidden[:, rank:], alpha=ctx.scale)
        grad_down.addmm_(grad_hidden[:, :rank].T, x)
        grad_x = (grad_y @ dense_weight(ctx.base)).addmm_(grad_hidden, down) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, None, None, None


class RelativeLinear(nn.Module):
    """``base`` (frozen) plus ``scale`` · ((U₀ + ``up``)(D₀ + ``down``) - U₀ D₀).

    ``down`` (rank, in) and ``up`` (out, rank) are leaf tensors of the base's dtype that require gradients; ``start`` is
    (D₀, U₀), of the same shapes and dtype. Gradients are added to ``gradients``, two tensors of the same shapes, except
    that without ``gradients`` they arrive in ``.grad``. A value or rank that ``dropout`` leaves out is missing in both
    products.
    """

    def __init__(
        self,
        base: FrozenLinear,
        down: Tensor,
        up: Tensor,
        start: tuple[Tensor, Tensor],
        scale: float,
        *,
        gradients: tuple[Tensor, Tensor] | None = None,
        dropout: ModuleDropout | None = None,
    ):
        super().__init__()
        self.base, self.scale, self._dropout = base, scale, dropout
        self.down, self.up, self._start, self._gradients = down, up, start, gradients
        for matrix, gradient in zip((down, up), gradients or (), strict=False):
            matrix.register_post_accumulate_grad_hook(partial(hand_over, gradient))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the base's dtype."""
        if self._gradients is None or self._dropout is not None or torch.compiler.is_compiling():
            return self.plain(x)
        rows = x.reshape(-1, x.shape[-1])
        trained = (self.down, self.up)
        # Both are arguments of their own too, so that autograd knows that the result depends on them.
        y = _AddingRelative.apply(rows, self.base, trained, self._start, self.scale, self._gradients, *trained)
        return y.view(*x.shape[:-1], y.shape[-1])

    def plain(self, x: Tensor) -> Tensor:
        """The same by autograd alone."""
        down, up = joined(self.down, self.up, *self._start)
        if self._dropout is not None:
            halves = (x @ down.T).chunk(2, dim=-1)
            hidden = torch.cat([self._dropout.hidden(half, channels=-1) for half in halves], dim=-1)
            return self.base(x) + self._dropout.module((hidden * self.scale) @ up.T)
        rows = x.reshape(-1, x.shape[-1])
        y = torch.addmm(self.base(rows), rows @ down.T, up.T, alpha=self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])
