"""The validation loss in the course of a run: when it is measured, which step was the best, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..progress import Progress
from .interval import half_width
from .plan import RunPlan
from .records import Records
from .session import TrainingSession
from .validation import mean_loss, validation_losses
from .validation_record import ValidationRecord

_STEPS, _LOSSES, _BEST = "validation.steps", "validation.losses", "validation.best.{}"
"""Names of the tensors that are saved."""


def check_validation(plan: RunPlan) -> None:
    """Raise ``ConfigError`` where measurements are asked for and there are no validation images."""
    every = plan.config.validation.every
    if every and not plan.training.validation:
        raise ConfigError(
            f"validation.every = {every}: there are no validation images; add a table [[data.sets]] with "
            'role = "validation" and a folder of images that are not trained on'
        )


class ValidationCourse:
    """Measures every ``validation.every`` steps, before the first step, and after the last.

    With ``validation.stop`` the weights of the lowest loss are kept in main memory. It is the same in every process.
    """

    def __init__(self, plan: RunPlan, records: Records):
        """``records`` receives each measurement."""
        self._section, self._last = plan.config.validation, plan.steps
        self._receiver = records
        self._steps: list[int] = []
        self._losses: list[np.ndarray] = []
        self._best: list[Tensor] = []

    @property
    def records(self) -> list[ValidationRecord]:
        """All measurements, in order of the steps."""
        means = [losses.astype(np.float64).mean(1) for losses in self._losses]
        records: list[ValidationRecord] = []
        best: int | None = None
        for number, (step, images) in enumerate(zip(self._steps, means, strict=True)):
            loss = mean_loss(self._losses[number])
            risen = best is not None and _is_above(images - means[best])
            is_best = step > 0 and math.isfinite(loss) and (best is None or loss < records[best].loss)
            best = number if is_best else best
            records.append(
                ValidationRecord(
                    step=step,
                    loss=loss,
                    interval=half_width(images),
                    difference=float((images - means[0]).mean()),
                    difference_interval=half_width(images - means[0]),
                    best=is_best,
                    risen=risen,
                )
            )
        return records

    @property
    def over(self) -> bool:
        """Whether the run is to stop, as the last ``validation.stop`` measurements have all risen."""
        last = self.records[-self._section.stop :] if self._section.stop else []
        return 0 < self._section.stop == len(last) and all(record.risen for record in last)

    def due(self, done: int) -> bool:
        """Whether a measurement after ``done`` steps is due that was not made yet."""
        every = self._section.every
        return every > 0 and (done % every == 0 or done == self._last) and done not in self._steps

    def measure(self, done: int, session: TrainingSession, progress: Progress) -> None:
        """Measure after ``done`` steps, with the attached layers; what is trained and drawn stays as it is."""
        with session.averaged():
            losses = validation_losses(session, progress)
            assert losses is not None
            self._steps.append(done)
            self._losses.append(losses)
            records = self.records
            if self._section.stop and records[-1].best:
                self._best = [parameter.detach().cpu().clone() for parameter in session.adapter.parameters]
        self._receiver.measured(records)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that ``restore`` needs, by name, in main memory."""
        if not self._steps:
            return {}
        return {
            _STEPS: torch.tensor(self._steps),
            _LOSSES: torch.from_numpy(np.stack(self._losses)),
            **{_BEST.format(number): tensor for number, tensor in enumerate(self._best)},
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``; other tensors are left alone."""
        if _STEPS in tensors:
            self._steps = tensors[_STEPS].tolist()
            self._losses = list(tensors[_LOSSES].numpy())
            names = (_BEST.format(number) for number in range(len(tensors)))
            self._best = [tensors[name] for name in names if name in tensors]
            self._receiver.known(self.records)

    @contextmanager
    def resulting(self, session: TrainingSession) -> Generator[ValidationRecord | None]:
        """Within the block, the layers have the weights that the run results in, of which the measurement is returned.

        With ``validation.stop`` they are those of the lowest loss, else the last ones. None where those were not measured.
        """
        records = self.records
        with session.holding(self._best) if self._best else session.averaged():
            if self._best:
                yield [record for record in records if record.best][-1]
            else:
                yield records[-1] if records and records[-1].step == self._last else None


def _is_above(differences: np.ndarray) -> bool:
    """Whether the mean of ``differences``, (images,), is above 0 by more than its interval, or is NaN or Inf."""
    mean = float(differences.mean())
    return not math.isfinite(mean) or mean > (half_width(differences) or 0.0)
