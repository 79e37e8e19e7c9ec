"""Too little memory, as one sentence that says where, and what to change."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ..base.device_memory import out_of_memory
from ..errors import DeviceMemoryError

CLOSE_OTHERS = "close other programs that use the memory, then run the same command again"
"""What helps where no setting does."""


def why_not_written(error: Exception) -> str:
    """A few words on a file that could not be written: what the disk says, or that memory is short. Raises others."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    if out_of_memory(error):
        return "out of memory"
    raise error


@contextmanager
def explained(doing: str, remedy: str) -> Generator[None]:
    """Within the block, running out of memory is one sentence: while ``doing``; what to do is ``remedy``."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise DeviceMemoryError(f"out of memory while {doing}; {remedy}") from None
