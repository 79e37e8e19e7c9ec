"""Losses for TensorBoard or Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.sections import OutputSection
from ..errors import ConfigError
from .checkpoint import Checkpoint
from .plan import RunPlan

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "sdlora"
"""Name of the project at Weights & Biases."""
logger = logging.getLogger(__name__)


def check_tracker(section: OutputSection) -> None:
    """Raise ``ConfigError`` where the package of ``output.tracker`` is not installed."""
    if section.tracker != "none" and find_spec(section.tracker) is None:
        raise ConfigError(
            f'output.tracker = "{section.tracker}": {section.tracker} is not installed '
            f"(pip install 'sdlora[{section.tracker}]')"
        )


class Tracker:
    """Sends values by step to what ``output.tracker`` names. What it raises is a warning, and the end of the sending.

    Settings are sent by name, without any path; the libraries themselves add the name of the host: TensorBoard to the
    names of its files, Weights & Biases to what it knows of the machine. Nothing is opened before the first value.
    """

    def __init__(self, plan: RunPlan, start: Checkpoint):
        """The run goes on from ``start``; what was recorded of later steps is dropped, where the library can."""
        self._plan, self._start = plan, start
        self._tracker: GeneralTracker | None = None
        self._failed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` after ``step`` steps."""
        self._guarded(lambda: self._opened().log(dict(values), step=step))

    def close(self) -> None:
        """Finish."""
        if self._tracker is not None:
            self._guarded(self._tracker.finish)

    def _opened(self) -> GeneralTracker:
        if self._tracker is None:
            output = Path(self._plan.config.output.path)
            folder = output.with_suffix(".tracker")
            folder.mkdir(parents=True, exist_ok=True)
            if self._plan.config.output.tracker == "tensorboard":
                self._tracker = self._tensorboard(output.stem, folder)
            else:
                self._tracker = self._wandb(output.stem, folder)
        return self._tracker

    def _tensorboard(self, name: str, folder: Path) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker

        done = self._start.step
        tracker = TensorBoardTracker(name, folder, purge_step=done + 1 if done else None)
        tracker.start()
        return tracker

    def _wandb(self, name: str, folder: Path) -> GeneralTracker:
        from accelerate.tracking import WandBTracker

        # The same in each call of a run, so that a resumed one goes on in the same place, and another in each run.
        run = hashlib.sha256(f"{name} {self._start.started_at!r} {self._plan.identity.to_json()}".encode()).hexdigest()
        tracker = WandBTracker(PROJECT, name=name, id=run[:16], resume="allow", dir=str(folder))
        tracker.start()
        tracker.store_init_configuration(dict(self._plan.identity.config))
        return tracker

    def _guarded(self, call: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # Whatever another service raises, the run goes on.
            self._failed = True
            kind = self._plan.config.output.tracker
            logger.warning("output.tracker = %s failed (%s); the run goes on without it", kind, error)
