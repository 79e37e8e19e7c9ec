"""Too little memory, as one sentence that says where, and what to change."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ..base.device_memory import out_of_memory
from ..errors import DeviceMemoryError

CLOSE_OTHERS = "close other programs that use the memory, then run the same command again"
"""What helps where no setting does."""


@contextmanager
def explained(doing: str, remedy: str) -> Generator[None]:
    """Within the block, running out of memory is one sentence: while ``doing``; what to do is ``remedy``."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise DeviceMemoryError(f"out of memory while {doing}; {remedy}") from None
