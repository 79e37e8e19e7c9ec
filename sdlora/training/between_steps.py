"""What a run does between its steps: losses are read, states saved, the validation loss measured, samples drawn."""

from __future__ import annotations

import torch

from ..progress import Progress, Stop
from .checkpoint import Checkpoint
from .fitted_steps import FittedSteps
from .saving import RunFiles, save_state
from .shortage import CLOSE_OTHERS, explained


class BetweenSteps:
    """Reads losses and writes files where the loop of the steps says so."""

    def __init__(self, fitted: FittedSteps, start: Checkpoint, files: RunFiles, progress: Progress):
        self._fitted, self._start, self._files, self._progress = fitted, start, files, progress
        session = fitted.session
        self._steps = session.plan.steps
        self.losses = torch.zeros(self._steps - start.step, device=session.base.device)
        """Loss of each step after ``start``, float32 on the device; filled by the loop."""
        self._reported = start.step
        progress.start("Training", self._steps, start.step)

    def read(self, done: int) -> None:
        """Read the losses of the steps up to ``done`` that were not read yet; waits for the device."""
        if done == self._reported:
            return
        accelerator, first = self._fitted.session.accelerator, self._start.step
        recent = self.losses[self._reported - first : done - first]
        if accelerator.num_processes > 1:  # Each has its share of every loss.
            torch.distributed.all_reduce(recent)
        if self._files.records.wanted:
            self._files.records.add(self._reported, recent.tolist())
        self._progress.advance(done - self._reported, f"loss {recent.mean().item():.4f}")
        self._reported = done

    def save(self, done: int) -> str:
        """Save the state after ``done`` steps; returns what to say of that when stopping there."""
        accelerator, records = self._fitted.session.accelerator, self._files.records
        if records.wanted and done > self._reported and accelerator.num_processes == 1:
            self.read(done)
        records.draw()
        if not accelerator.is_main_process:
            return ""
        return save_state(self._files, self._start, done, self._fitted.session)

    def look(self, done: int, stop: Stop) -> None:
        """Measure the validation loss and draw the samples that are due after ``done`` steps, these until ``stop`` is set.

        Raises:
            DeviceMemoryError: not enough memory for the measurement.
        """
        session, validation, samples = self._fitted.session, self._files.validation, self._files.samples
        looked = validation.due(done)
        if looked:
            self.read(done)  # Recorded in order of the steps, as Weights & Biases wants it.
            with explained(f"measuring the validation loss after step {done}", CLOSE_OTHERS):
                validation.measure(done, session, self._progress)
        if session.accelerator.is_main_process and samples.due(done):
            samples.draw(done, session, self._progress, stop)
            looked = True
        if looked:
            self._progress.start("Training", self._steps, self._reported)
