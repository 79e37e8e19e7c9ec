"""Counting the memory of tensors, whatever their device: on the meta device, what a computation would need."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within a ``with`` block, counts the bytes of every storage that an operation makes, until it is freed.

    What existed before is not counted. ``now`` and ``peak`` are bytes; an allocator's rounding and the workspace within
    a kernel are not in them.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """By identity of the storage, which lives as long as the tensors that share it."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._meet(tensor, new=True)
        self.peak = max(self.peak, self.now)
        return result

    def _meet(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if new else 0

        def freed(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size


def _tensors(values: Any) -> Generator[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


class _Kernel(TorchFunctionMode):
    """Attention by ``kernel``, which keeps its result and one number for each row, not a matrix of rows and columns."""

    def __init__(self, kernel: Callable[..., Any]):
        super().__init__()
        self._kernel = kernel

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._kernel(*args, **kwargs)
        return func(*args, **kwargs)


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As CUDA's memory-efficient kernel keeps it; the flash kernel keeps as much."""
    grad = query.requires_grad or key.requires_grad or value.requires_grad
    mask = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, grad, dropout_p, is_causal, scale=scale)[0]


def _cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As the CPU's flash kernel keeps it."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


KERNELS: Mapping[str, Callable[..., Tensor]] = {"cuda": _efficient, "cpu": _cpu_flash}


@contextmanager
def attention_of(device_type: str) -> Generator[None]:
    """Within the block, attention needs the memory that it needs on ``device_type``.

    On the meta device torch takes the plain products, whose attention matrix grows with the square of the number of
    latent pixels. CUDA and the CPU have kernels without that matrix, which are used where torch chooses them there: without
    dropout, and without a mask that needs a gradient. Apple's Metal has none in training, so nothing changes for it.
    """
    kernel = KERNELS.get(device_type)
    if kernel is None:
        yield
        return
    with _Kernel(kernel):
        yield
