"""What is recorded of a run: losses and learning rates, in CSV files with a curve beside them, and for callbacks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ResumeError
from ..files import printable, write_whole
from .checkpoint import Checkpoint
from .curve import loss_curve
from .plan import RunPlan
from .rates import rate_factor, steps_of
from .tracker import Tracker
from .validation_record import ValidationRecord

HEADER = "step,loss,learning_rate,text_encoder_learning_rate\n"
VALIDATION_HEADER = "step,loss,interval,difference,difference_interval\n"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step of a run."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the batch; NaN or Inf where the step was skipped because of that."""
    learning_rate: float
    """That of the UNet's modules in this step."""
    text_encoder_learning_rate: float
    """That of the text encoders; 0 after ``optimizer.text_encoder_stop``."""


class Records:
    """Receives the losses where a run reads them, every few steps, in order of the steps."""

    def __init__(
        self,
        plan: RunPlan,
        on_step: Callable[[StepRecord], None] | None = None,
        on_validation: Callable[[ValidationRecord], None] | None = None,
        *,
        main: bool = True,
    ):
        """``on_step`` is called with each step, once its loss was read; ``on_validation`` with each measurement.

        Nothing is recorded where not ``main``.
        """
        self._plan, self._on_step = plan, on_step if main else None
        self._on_validation = on_validation if main else None
        output, section = Path(plan.config.output.path), plan.config.output
        self._log = LossLog(output) if main and section.log else None
        self._table = ValidationLog(output) if main and section.log and plan.config.validation.every else None
        self._is_tracked = main and section.tracker != "none"
        self._tracker: Tracker | None = None
        self.wanted = self._log is not None or self._on_step is not None or self._is_tracked
        """Whether anything is recorded of the steps."""

    def open(self, start: Checkpoint) -> None:
        """Go on from ``start``.

        Raises:
            ResumeError: a file that is no log has the log's name.
        """
        if self._log is not None:
            self._log.open(start.step)
        if self._table is not None:
            self._table.check()
        if self._is_tracked:
            self._tracker = Tracker(self._plan, start)

    def close(self) -> None:
        """Nothing more is recorded."""
        if self._tracker is not None:
            self._tracker.close()

    def add(self, first: int, losses: Sequence[float]) -> None:
        """Record the ``losses`` of the steps from ``first`` (from 0) on."""
        records = [self._record(step, loss) for step, loss in enumerate(losses, first)]
        if self._log is not None:
            self._log.append(records)
        if self._on_step is not None:
            for record in records:
                self._on_step(record)
        if self._tracker is not None:
            for record in records:
                self._tracker.log(record.step, _tracked(record))

    def known(self, records: Sequence[ValidationRecord]) -> None:
        """Write down all measurements so far, of which earlier calls of the run made some."""
        if self._log is not None:
            self._log.validation = records
        if self._table is not None:
            self._table.write(records)

    def measured(self, records: Sequence[ValidationRecord]) -> None:
        """Record the last of all measurements so far."""
        self.known(records)
        if self._on_validation is not None:
            self._on_validation(records[-1])
        if self._tracker is not None:
            last = records[-1]
            self._tracker.log(last.step, {"validation/loss": last.loss, "validation/difference": last.difference})

    def draw(self) -> None:
        """Draw the curve of what was recorded so far."""
        if self._log is not None:
            self._log.draw()

    def _record(self, step: int, loss: float) -> StepRecord:
        config, length = self._plan.config, self._plan.length
        factor = rate_factor(step, config.optimizer, steps=length.in_force(step))
        encoders = config.optimizer.text_encoder_rate(self._plan.base.family) * factor
        return StepRecord(
            step=step + 1,
            loss=loss,
            learning_rate=config.optimizer.learning_rate * factor,
            text_encoder_learning_rate=encoders
            if step < steps_of("text_encoder", config.optimizer, steps=length.steps, planned=length.planned)
            else 0.0,
        )


def _tracked(record: StepRecord) -> dict[str, float]:
    return {
        "loss": record.loss,
        "learning_rate/unet": record.learning_rate,
        "learning_rate/text_encoder": record.text_encoder_learning_rate,
    }


class LossLog:
    """``NAME.log.csv`` beside the output, a line for each step, and ``NAME.log.svg``.

    The file holds whole lines at any time, except while a process is killed; a torn line is dropped when it is opened
    again. What cannot be written is a warning, and is tried again with the next lines.
    """

    def __init__(self, output: Path):
        self._file, self._curve = output.with_suffix(".log.csv"), output.with_suffix(".log.svg")
        self.validation: Sequence[ValidationRecord] = ()
        """Measurements that the curve shows."""
        self._title = printable(Path(output.stem))
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._size, self._pending, self._failed = 0, HEADER, False

    def open(self, done: int) -> None:
        """Keep the lines of the first ``done`` steps, of which none may be there; drop the others.

        Raises:
            ResumeError: the file exists and is no loss log.
        """
        text = ""
        if self._file.exists():
            text = self._file.read_text(encoding="utf-8", errors="replace")
            if not (text.startswith(HEADER) or HEADER.startswith(text)):
                raise _no_log(self._file, "loss log")
        lines = []
        for line in text.splitlines(keepends=True)[1:] if done else ():
            step, loss = _read(line)
            if step > done or step <= (self._steps[-1] if self._steps else 0):
                break
            lines.append(line)
            self._steps.append(step)
            self._losses.append(loss)
        kept = "".join([HEADER, *lines])
        try:
            if kept != text:
                write_whole(self._file, kept.encode())
        except OSError as error:
            self._warn(self._file, error)
            self._pending = kept
        else:
            self._size, self._pending = len(kept.encode()), ""

    def append(self, records: Sequence[StepRecord]) -> None:
        """Write the lines of further steps."""
        for record in records:
            self._steps.append(record.step)
            self._losses.append(record.loss)
            rates = f"{record.learning_rate:.6g},{record.text_encoder_learning_rate:.6g}"
            self._pending += f"{record.step},{record.loss:.7g},{rates}\n"
        lines = self._pending.encode()
        try:
            with self._file.open("r+b" if self._file.exists() else "wb") as file:
                file.truncate(self._size)  # After a write that failed, a part of it may be there.
                file.seek(self._size)
                file.write(lines)
        except OSError as error:
            self._warn(self._file, error)
        else:
            self._size, self._pending = self._size + len(lines), ""

    def draw(self) -> None:
        """Write the curve, whole or not at all."""
        try:
            curve = loss_curve(self._title, self._steps, self._losses, self.validation)
            write_whole(self._curve, curve.encode(), durable=False)
        except OSError as error:
            self._warn(self._curve, error)

    def _warn(self, file: Path, error: OSError) -> None:
        if not self._failed:
            logger.warning("%s cannot be written (%s); the run goes on", printable(file), error.strerror or error)
        self._failed = True


class ValidationLog:
    """``NAME.validation.csv`` beside the output, a line for each measurement; all of it is written with each."""

    def __init__(self, output: Path):
        self._file = output.with_suffix(".validation.csv")

    def check(self) -> None:
        """Raise ``ResumeError`` where a file that is no such log has its name."""
        if self._file.exists() and not self._file.read_text("utf-8", "replace").startswith(VALIDATION_HEADER):
            raise _no_log(self._file, "validation log")

    def write(self, records: Sequence[ValidationRecord]) -> None:
        """Write ``records``; that it cannot be written is a warning, and the next call writes them too."""
        lines = [
            f"{record.step},{record.loss:.7g},{_cell(record.interval)},{record.difference:.7g},"
            f"{_cell(record.difference_interval)}\n"
            for record in records
        ]
        try:
            write_whole(self._file, "".join([VALIDATION_HEADER, *lines]).encode())
        except OSError as error:
            logger.warning("%s cannot be written (%s); the run goes on", printable(self._file), error.strerror or error)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def _no_log(file: Path, kind: str) -> ResumeError:
    return ResumeError(
        f"{printable(file)}: exists and is not the {kind} of a run; move it, choose another output.path, or set "
        "output.log = false"
    )


def _read(line: str) -> tuple[int, float]:
    """Step and loss of a whole line; a step larger than any for another line."""
    cells = line.removesuffix("\n").split(",")
    try:
        if line.endswith("\n") and len(cells) == HEADER.count(",") + 1:
            return int(cells[0]), float(cells[1])
    except ValueError:
        pass
    return _NO_STEP, math.nan


_NO_STEP = 1 << 62
