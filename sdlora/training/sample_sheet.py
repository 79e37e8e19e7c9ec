"""The sample sheet of a run, whether or not it can be made: its rows on the way, and the last one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ..base.base import Base
from ..base.decode import LatentDecoder
from ..base.device_memory import out_of_memory, release_memory, working_on
from ..errors import Interrupted, SdloraError
from ..files import write_png
from ..generation.denoise import denoise
from ..generation.scheduled_prompt import encode_requests
from ..progress import Progress, Stop
from .plan import RunPlan
from .sample_cells import stated
from .samples import (
    REQUESTS_KEY,
    sample_cells,
    sample_moments,
    sample_requests,
    sample_sheet,
    sheet_file,
    write_samples,
)
from .session import TrainingSession

logger = logging.getLogger(__name__)


def lacks_samples(plan: RunPlan) -> bool:
    """Whether the sheet of a finished run is not there, lacks its last row, or was drawn from other prompts or settings."""
    requests = sample_requests(plan)
    return bool(requests) and not _is_complete(sheet_file(Path(plan.config.output.path)), stated(requests))


def _is_complete(sheet: Path, columns: str) -> bool:
    """Whether ``sheet`` has the recipes of its last row, which a sheet on the way has not, and states ``columns``.

    A sheet of an earlier version states nothing, and counts.
    """
    try:
        with Image.open(sheet) as image:
            return "parameters" in image.info and image.info.get(REQUESTS_KEY, columns) == columns
    except (OSError, SyntaxError, ValueError):
        return False


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
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        reason = _reason(error)
    logger.warning("%s is complete, but its samples were not drawn (%s); the same command draws them", output, reason)
    return None


def _reason(error: Exception) -> str:
    return "out of memory; close other programs that use it" if out_of_memory(error) else str(error)


class SamplesOnTheWay:
    """Draws the rows of the sheet before the last, while a run goes on, with the layers that are attached.

    Neither a weight nor anything that is drawn in training changes. What fails is a warning.
    """

    def __init__(self, plan: RunPlan):
        self._plan, self._moments = plan, sample_moments(plan)
        self._requests = sample_requests(plan) if self._moments else []
        self._cells = sample_cells(plan)

    def remove(self) -> None:
        """Remove the images that earlier runs for this output drew."""
        self._cells.remove()

    def due(self, done: int) -> bool:
        """Whether a row of ``done`` steps belongs to the sheet."""
        if not self._requests or done >= self._plan.steps:
            return False
        return self._moments.due(done) or (done == 0 and self._plan.config.samples.at_first)

    def draw(self, done: int, session: TrainingSession, progress: Progress, stop: Stop) -> None:
        """Draw the images of ``done`` steps that are not there, and write the sheet of all so far.

        Nothing is drawn from when ``stop`` is set; the rest is drawn when the run is resumed.
        """
        try:
            missing = self._cells.missing(done)
            if missing:
                self._draw(done, missing, session, progress, stop)
            rows = self._cells.rows()
            if rows:
                write_png(sheet_file(Path(self._plan.config.output.path)), sample_sheet(self._plan, rows))
        except Interrupted:
            return
        except (SdloraError, OSError, RuntimeError, MemoryError) as error:
            reason = _reason(error)
            logger.warning("the samples of step %d were not drawn (%s); the run goes on without them", done, reason)
            release_memory(session.base.device)

    @torch.no_grad()
    def _draw(self, done: int, missing: list[int], session: TrainingSession, progress: Progress, stop: Stop) -> None:
        base, requests = session.base, [self._requests[number] for number in missing]
        progress.start(f"Samples of step {done}", sum(request.steps for request in requests))
        with session.averaged():
            with working_on(base.device, *base.encoder_models()):
                conditionings = [encode_requests(base, [request]) for request in requests]
            for number, request, conditioning in zip(missing, requests, conditionings, strict=True):
                latents = denoise(base, [request], conditioning, progress, stop)
                with working_on(base.device, base.vae):
                    pixels = LatentDecoder(base)(latents)[0]
                array = pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
                self._cells.put(done, number, Image.fromarray(array))
