"""A linear layer with a trainable low-rank change beside its frozen weight, which may be quantised (QLoRA)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .quantized import FrozenLinear, dense_weight


class _AddingLowRank(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Dᵀ) Uᵀ, in three products forward and five backward; only x and x Dᵀ are kept.

    x (n, in), D (rank, in), U (out, rank), of the dtype of ``base``. The gradients of D and U are added to
    ``gradients`` in place, which saves a temporary and an addition each. Those of the frozen W and b are not computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: FrozenLinear,
        down: Tensor,
        up: Tensor,
        scale: float,
        gradients: tuple[Tensor, Tensor],
    ) -> Tensor:
        hidden = x @ down.T
        ctx.save_for_backward(x, hidden, down, up)
        ctx.base, ctx.scale, ctx.gradients = base, scale, gradients
        return base(x).addmm_(hidden, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("a LoRA layer has no second derivative in its fast form; use LoraLinear.plain")
        (grad_y,) = grad_outputs
        x, hidden, down, up = ctx.saved_tensors
        grad_down, grad_up = ctx.gradients
        needs_x, _, needs_down, needs_up, *_ = ctx.needs_input_grad
        grad_hidden = torch.addmm(hidden, grad_y, up, beta=0, alpha=ctx.scale)
        if needs_up:
            grad_up.addmm_(grad_y.T, hidden, alpha=ctx.scale)
        if needs_down:
            grad_down.addmm_(grad_hidden.T, x)
        grad_x = (grad_y @ dense_weight(ctx.base)).addmm_(grad_hidden, down) if needs_x else None
        return grad_x, None, None, None, None, None


class LoraLinear(nn.Module):
    """``base`` (frozen) plus ``scale`` · ``up`` @ ``down``.

    ``down`` (rank, in) and ``up`` (out, rank) are leaf tensors of the base's dtype that require gradients. Without
    ``gradients`` those arrive in their ``.grad``, as autograd has it. Otherwise they are added to ``gradients``, two
    tensors of the same shapes, whatever happens to ``.grad``: without temporaries, except under ``torch.compile``, which
    gets the plain form.
    """

    def __init__(
        self,
        base: FrozenLinear,
        down: Tensor,
        up: Tensor,
        scale: float,
        *,
        gradients: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up, self._gradients = down, up, gradients
        for matrix, gradient in zip((down, up), gradients or (), strict=False):
            matrix.register_post_accumulate_grad_hook(partial(hand_over, gradient))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the base's dtype."""
        if self._gradients is None or torch.compiler.is_compiling():
            return self.plain(x)
        rows = x.reshape(-1, x.shape[-1])
        y = _AddingLowRank.apply(rows, self.base, self.down, self.up, self.scale, self._gradients)
        return y.view(*x.shape[:-1], y.shape[-1])

    def plain(self, x: Tensor) -> Tensor:
        """The same by autograd alone."""
        rows = x.reshape(-1, x.shape[-1])
        y = torch.addmm(self.base(rows), rows @ self.down.T, self.up.T, alpha=self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])


def hand_over(target: Tensor, leaf: Tensor) -> None:
    """Add to ``target`` what autograd put into ``leaf.grad``."""
    if leaf.grad is not None:
        target += leaf.grad
        leaf.grad = None
