"""Random start values, each a function of (seed, name) alone."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


def kaiming_uniform(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """``shape`` (rank, in, ...) float32 from U(-1/√n, 1/√n), n = in · …, as ``kaiming_uniform_(a=√5)`` (He et al. 2015)."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(_generator(seed, name).uniform(-bound, bound, shape).astype(np.float32))


def normal(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """``shape`` float32 from N(0, 1)."""
    return torch.from_numpy(_generator(seed, name).standard_normal(shape).astype(np.float32))


def _generator(seed: int, name: str) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
