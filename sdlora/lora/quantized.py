"""Frozen linear layers whose weights are kept in 8 or 4 bits and expanded where they are used."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64
"""Weights that share a scale in nf4 (Dettmers et al. 2023, section 3)."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat (Dettmers et al. 2023, appendix E)."""


class QuantizedLinear(nn.Module, ABC):
    """A frozen linear layer, y = x Wᵀ + b, whose W is computed from its codes in each pass, forward and backward.

    Gradients flow to x alone. W exists for as long as one product takes.
    """

    kind: ClassVar[str]
    codes: Tensor

    def __init__(self, linear: nn.Linear, device: torch.device):
        """The weight and bias of ``linear``, quantised on ``device``; they are of its dtype where they are used."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
        self._encode(linear.weight.detach().to(device).float())

    @abstractmethod
    def _encode(self, weight: Tensor) -> None:
        """Keep ``weight``, (out, in) float32, as buffers, among them ``codes``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """W, (out, in), of ``dtype``."""

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _FrozenProduct.apply(x, self)


class Int8Linear(QuantizedLinear):
    """Each row in whole numbers from -127 to 127, times a float32 scale (Dettmers et al. 2022, section 2.1)."""

    kind = "int8"
    scales: Tensor

    def _encode(self, weight: Tensor) -> None:
        largest = weight.abs().amax(dim=1, keepdim=True)
        self.register_buffer("scales", largest / 127)
        self.register_buffer("codes", (weight * (127 / _positive(largest))).round_().to(torch.int8))

    def dense(self) -> Tensor:
        return torch.mul(self.codes, self.scales, out=self.codes.new_empty(self.codes.shape, dtype=self.dtype))


class NF4Linear(QuantizedLinear):
    """Blocks of 64 in 4-bit NormalFloat, times their largest value (Dettmers et al. 2023, section 3).

    That largest value is float16, which is exact where the checkpoint is; two codes share a byte, the first in its upper
    half. On CUDA bitsandbytes expands them, if it is installed.
    """

    kind = "nf4"
    largest: Tensor
    """(blocks,) float16."""

    def _encode(self, weight: Tensor) -> None:
        blocks = weight.reshape(-1, BLOCK)
        limits = torch.finfo(torch.float16)
        largest = blocks.abs().amax(dim=1).clamp_(max=limits.max).to(torch.float16)
        self.register_buffer("largest", largest)
        values = _nf4_pairs(weight.device)[:16, 1]
        if weight.is_cuda:
            bitsandbytes_works(weight.device)  # Tried here, so that no step waits for it.
        middles = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks / _positive(largest.float())[:, None], middles, out_int32=True).to(torch.uint8)
        self.register_buffer("codes", codes[:, ::2] * 16 + codes[:, 1::2])

    def dense(self) -> Tensor:
        shape = (self.out_features, self.in_features)
        if self.codes.is_cuda and bitsandbytes_works(self.device):
            return expanded_by_bitsandbytes(self.codes, self.largest, shape, self.dtype)
        return expanded(self.codes, self.largest, shape, self.dtype)


FrozenLinear = nn.Linear | QuantizedLinear

QUANTIZED: dict[str, type[QuantizedLinear]] = {layer.kind: layer for layer in (Int8Linear, NF4Linear)}
"""Value of ``base.quantization`` -> the layer of that kind."""


def can_quantize(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer whose weight divides into whole blocks."""
    return isinstance(module, nn.Linear) and math.prod(module.weight.shape) % BLOCK == 0


def dense_weight(linear: FrozenLinear) -> Tensor:
    """The weight of a frozen layer, (out, in); that of a quantised one is computed."""
    return linear.dense() if isinstance(linear, QuantizedLinear) else linear.weight


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b; backward to x alone. Nothing is kept, neither x nor W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (grad_y,) = grad_outputs
        return grad_y @ ctx.layer.dense(), None


def _positive(tensor: Tensor) -> Tensor:
    """A block of zeros is divided by a positive number."""
    return tensor.clamp(min=torch.finfo(torch.float32).tiny)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """Byte -> the two values of its codes, (256, 2) float32."""
    values = torch.tensor(NF4, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)


def expanded(codes: Tensor, largest: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight of an ``NF4Linear`` of ``shape``, rounded to ``dtype`` once."""
    values = F.embedding(codes.int(), _nf4_pairs(codes.device)).view(-1, BLOCK)
    dense = torch.empty(shape, dtype=dtype, device=codes.device)
    torch.mul(values, largest[:, None], out=dense.view(-1, BLOCK))
    return dense


def expanded_by_bitsandbytes(codes: Tensor, largest: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The same by the kernel of bitsandbytes, the library of the extra ``quant``."""
    importlib.import_module("bitsandbytes")
    return torch.ops.bitsandbytes.dequantize_4bit(codes.view(-1, 1), largest.float(), BLOCK, "nf4", shape, dtype)


@cache
def bitsandbytes_works(device: torch.device) -> bool:
    """Whether bitsandbytes is installed and expands on ``device`` as ``expanded`` does; tried once, with every byte."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(8, 32)
    largest = torch.ones(8, dtype=torch.float16, device=device)
    try:
        theirs = expanded_by_bitsandbytes(codes, largest, (8, 64), torch.float32)
    except (ImportError, OSError, RuntimeError, AttributeError):
        return False
    return torch.allclose(theirs, expanded(codes, largest, (8, 64), torch.float32), rtol=1e-6, atol=1e-6)
