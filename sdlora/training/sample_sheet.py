"""The sample sheet of a run that is finished, whether or not the sheet can be made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from ..base.base import Base
from ..base.device_memory import out_of_memory
from ..errors import SdloraError
from ..progress import Progress
from .plan import RunPlan
from .samples import sample_prompts, sheet_file, write_samples

logger = logging.getLogger(__name__)


def lacks_samples(plan: RunPlan) -> bool:
    """Whether the sheet that ``plan`` asks for is not there."""
    return bool(sample_prompts(plan)) and not sheet_file(Path(plan.config.output.path)).exists()


def draw_samples(
    plan: RunPlan, loaded: Callable[[], Base], *, progress: Progress, stop: threading.Event | None
) -> Path | None:
    """Write the sample sheet of ``plan`` with the base that ``loaded`` returns, as ``write_samples`` does.

    What goes wrong is a warning, since the trained file is complete: too little memory, NaN or Inf, a full disk. The next
    call of the same command draws the sheet. Returns its path, or None where none was written.

    Raises:
        Interrupted: ``stop`` was set.
    """
    output = Path(plan.config.output.path)
    try:
        return write_samples(loaded(), plan, output, progress=progress, stop=stop)
    except (SdloraError, OSError, RuntimeError, MemoryError) as error:
        short = out_of_memory(error)
        if isinstance(error, RuntimeError) and not short:
            raise
        reason = "out of memory; close other programs that use it" if short else str(error)
    logger.warning("%s is complete, but its samples were not drawn (%s); the same command draws them", output, reason)
    return None
