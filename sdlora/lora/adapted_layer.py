"""Frozen layers, linear and convolutional, with trained tensors beside them: what the layers of all kinds share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .layers import hand_over
from .quantized import FrozenLinear, QuantizedLinear, dense_weight

FrozenLayer = FrozenLinear | nn.Conv2d


class AdaptedLayer(nn.Module):
    """``base`` (frozen) with ``leaves`` of its dtype beside it, whose gradients are added to ``gradients``."""

    def __init__(self, base: FrozenLayer, leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor]):
        super().__init__()
        self.base, self.leaves = base, dict(leaves)
        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(partial(hand_over, gradients[name]))


def weight_of(base: FrozenLayer) -> Tensor:
    """The weight of a frozen layer, (out, in[, kh, kw]); that of a quantised one is computed."""
    return base.weight if isinstance(base, nn.Conv2d) else dense_weight(base)


def shape_of(base: FrozenLayer) -> tuple[int, ...]:
    """Shape of that weight."""
    if isinstance(base, QuantizedLinear):
        return (base.out_features, base.in_features)
    return tuple(base.weight.shape)


def product(base: FrozenLayer, x: Tensor, weight: Tensor) -> Tensor:
    """What ``base`` would make of ``x`` with another ``weight`` and no bias."""
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x, weight, None, base.stride, base.padding, base.dilation)
    return x @ weight.T


def channels_axis(base: FrozenLayer) -> int:
    """The axis of the channels in what ``base`` takes and returns."""
    return 1 if isinstance(base, nn.Conv2d) else -1


def raised(base: FrozenLayer, hidden: Tensor, up: Tensor) -> Tensor:
    """``hidden`` times ``up``, (out, rank) or (out, rank, 1, 1), in each place."""
    return F.conv2d(hidden, up) if isinstance(base, nn.Conv2d) else hidden @ up.T


class ComputedProduct(torch.autograd.Function):
    """``product`` of x and a ΔW that ``formula`` computes from the leaves, here and again in the backward pass.

    So nothing of the size of ΔW is kept between the two. Raises ``RuntimeError`` for second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: FrozenLayer, formula: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(x, *leaves)
        ctx.base, ctx.formula = base, formula
        return product(base, x, formula(*leaves))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):
        """Gradients of x and of the leaves."""
        (grad_y,) = grad_outputs
        x, *leaves = ctx.saved_tensors
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            weight = ctx.formula(*leaves)
        grad_x, grad_weight = _gradients(ctx.base, x, weight.detach(), grad_y)
        grads = torch.autograd.grad(weight, leaves, grad_weight)
        return grad_x, None, None, *grads


def _gradients(base: FrozenLayer, x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and ``weight`` in ``product``."""
    if isinstance(base, nn.Conv2d):
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_y, x, weight, None, base.stride, base.padding, base.dilation, False, [0, 0], 1, [True, True, False]
        )
        return grad_x, grad_weight
    return grad_y @ weight, grad_y.flatten(0, -2).T @ x.flatten(0, -2)
