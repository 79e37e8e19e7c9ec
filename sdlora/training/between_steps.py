"""What a run does between its steps: losses are read, states saved, the validation loss measured, samples drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from ..progress import Progress, Stop
from .checkpoint import Checkpoint
from .fitted_steps import FittedSteps
from .processes import add_up
from .saving import RunFiles, save_state
from .shortage import CLOSE_OTHERS, explained


class BetweenSteps:
    """Counts the steps that are done, reads losses and writes files where the loop of the steps says so."""

    def __init__(self, fitted: FittedSteps, start: Checkpoint, files: RunFiles, progress: Progress):
        self._fitted, self._start, self._files, self._progress = fitted, start, files, progress
        session = fitted.session
        self._steps = session.plan.steps
        self._losses = torch.zeros(self._steps - start.step, device=session.base.device)
        self._reported = start.step
        self.done = start.step
        """Steps that are done in all."""
        progress.start("Training", self._steps, start.step)

    @property
    def losses(self) -> Tensor:
        """Loss of each step after the start, (steps,) float32 on the device; only this process's share until it was read."""
        return self._losses[: self.done - self._start.step]

    def step_done(self, loss: Tensor) -> None:
        """A step is done; ``loss`` is this process's share of its loss, () float32 on the device."""
        self._losses[self.done - self._start.step] = loss
        self.done += 1

    def read(self) -> None:
        """Read the losses that were not read yet; waits for the device, and for every process, which does so too.

        Raises:
            ProcessLostError: another process has ended.
        """
        if self.done == self._reported:
            return
        recent = self.losses[self._reported - self._start.step :]
        if self._fitted.session.accelerator.num_processes > 1:  # Each has its share of every loss.
            add_up(recent)
        if self._files.records.wanted:
            self._files.records.add(self._reported, recent.tolist())
        self._progress.advance(self.done - self._reported, f"loss {recent.mean().item():.4f}")
        self._reported = self.done

    def save(self) -> None:
        """Read the losses, and save the state, in every process. Raises as ``read``."""
        if self._fitted.session.accelerator.num_processes > 1 or self._files.records.wanted:
            self.read()
        self.save_here()

    def save_here(self) -> str:
        """Save the state, where this is the first process; returns what to say of that where the run stops.

        No other process has to do anything.
        """
        session = self._fitted.session
        self._files.records.draw()
        if not session.accelerator.is_main_process or self.done == self._start.step:
            return ""
        return save_state(self._files, self._start, self.done, session)

    def look(self, stop: Stop) -> None:
        """Measure the validation loss and draw the samples that are due, these until ``stop`` is set.

        Raises:
            DeviceMemoryError: not enough memory for the measurement.
            ProcessLostError: another process has ended.
        """
        session, validation, samples = self._fitted.session, self._files.validation, self._files.samples
        done = self.done
        looked = validation.due(done)
        if looked:
            self.read()  # Recorded in order of the steps, as Weights & Biases wants it.
            with explained(f"measuring the validation loss after step {done}", CLOSE_OTHERS):
                validation.measure(done, session, self._progress)
        if session.accelerator.is_main_process and samples.due(done):
            samples.draw(done, session, self._progress, stop)
            looked = True
        if looked:
            self._progress.start("Training", self._steps, self._reported)
