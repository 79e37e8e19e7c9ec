"""The same operations in the same order, so that a repeated step gives the same bits on a GPU too."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch

from ..errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = ":4096:8"


@contextmanager
def deterministic_algorithms(wanted: bool) -> Generator[None]:
    """Within the block, if ``wanted``, torch uses deterministic algorithms alone; afterwards all is as before.

    An operator that has none raises ``RuntimeError``. cuBLAS gets the fixed workspace that it needs for this, unless the
    environment sets one.

    Raises:
        ConfigError: cuBLAS has multiplied without it in this process; torch looks for it at the first product alone.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fill = torch.backends.cudnn.benchmark, torch._C._get_deterministic_fill_uninitialized_memory()
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, _FIXED)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling new memory finds faults of a program, and costs time.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        _check_workspace()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        torch._C._set_deterministic_fill_uninitialized_memory(fill)
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


def _check_workspace() -> None:
    if not torch.cuda.is_initialized():  # Nothing was multiplied there.
        return
    try:
        _multiply()
    except RuntimeError as error:
        if _WORKSPACE not in str(error):
            raise
        raise ConfigError(
            "train.deterministic = true: this process has used the GPU without a fixed workspace of cuBLAS before; set "
            f"{_WORKSPACE}={_FIXED} in the environment before Python starts, or train in a new process"
        ) from None


def _multiply() -> None:
    matrix = torch.ones(2, 2, device="cuda")
    torch.mm(matrix, matrix)
