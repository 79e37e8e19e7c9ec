"""LoRA files of a run: that of its last step, and those on the way, ``NAME-000500.safetensors`` beside it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..base.base import Base
from ..errors import LoraFileError, ResumeError
from ..families import WORDS_IN_CHUNK
from ..files import printable, rename_whole
from ..formats.lora_writer import write_lora
from ..formats.safetensors_file import read_header
from ..lora.change import Change
from ..progress import Progress, Silence
from .checkpoint import RunFolder, RunIdentity, forget_run, record_run, recorded_run
from .facts import describe_run
from .moments import Moments
from .plan import RunPlan
from .session import TrainingSession
from .shortage import why_not_written

EXPORT_KEY = "sdlora_run_on_the_way"
"""Metadata key of a file on the way that holds its run's identity. It is not the output's key, so that such a file under
the name of the output is not taken for that of a complete run."""
logger = logging.getLogger(__name__)


def write_run_file(
    path: Path,
    plan: RunPlan,
    base: Base,
    weights: Mapping[str, Change],
    *,
    step: int,
    tokens: int,
    started_at: float,
    validation_loss: float | None,
    identity_key: str,
    progress: Progress,
) -> bool:
    """Write the LoRA as it is after ``step`` steps, whole or not at all; see ``describe_run`` for what the file states.

    Returns whether the file states the run's identity, as ``identity_key``; where it does not, a record is needed.
    """
    level = plan.config.output.metadata
    metadata = describe_run(
        plan,
        base,
        weights=weights,
        step=step,
        tokens=tokens,
        started_at=started_at,
        validation_loss=validation_loss,
        progress=progress,
    )
    if level == "full":
        metadata[identity_key] = plan.identity.to_json()
    write_lora(
        path,
        weights,
        None if level == "none" else metadata,
        dtype=getattr(torch, plan.config.output.precision),
        family=plan.base.family,
        base_modules=plan.base.module_shapes(),
    )
    return level == "full"


class Exports:
    """The files on the way of one run, before its last step; the newest ``output.keep`` stay.

    They have no part in resuming. A file that no run for this output wrote is neither replaced nor removed.
    """

    def __init__(self, plan: RunPlan, folder: RunFolder):
        """``folder`` is the run's, in which a file is until it is complete."""
        self._plan, self._folder = plan, folder
        self._output, self._section = Path(plan.config.output.path), plan.config.output
        self._moments = Moments(
            steps=self._section.save_every,
            epochs=self._section.save_every_epochs,
            batches_per_epoch=plan.batches.batches_per_epoch,
        )

    def remove(self) -> None:
        """Remove the files on the way that earlier runs for this output wrote."""
        for file in self._files().values():
            if _writer(file) is not None:
                _remove(file)

    def check(self) -> None:
        """Find out before the run whether the names of its files are free.

        Raises:
            ResumeError: a file that this run did not write has one of the names.
        """
        for step, file in self._files().items():
            if self._due(step) and not self._own(file):
                raise ResumeError(
                    f"{printable(file)}: exists, and this run with {self._setting(step)} would replace it; "
                    "move it, choose another output.path, or, if an earlier run wrote it, start over with --restart"
                )

    def write(self, step: int, session: TrainingSession, *, started_at: float) -> None:
        """Write the file of ``step`` where one is due; one that cannot be written is a warning."""
        if not self._due(step):
            return
        file = self._name(step)
        try:
            self._write(file, step, session, started_at)
        except (OSError, RuntimeError, MemoryError) as error:
            reason = why_not_written(error)
            logger.warning("%s cannot be written (%s); the run goes on without it", printable(file), reason)
        except LoraFileError as error:  # Values that its precision cannot hold: the run may come back from them.
            reason = str(error).removeprefix(f"{self._folder.unfinished_file()}: ")
            logger.warning("%s cannot be written (%s); the run goes on without it", printable(file), reason)

    def _write(self, file: Path, step: int, session: TrainingSession, started_at: float) -> None:
        new = self._folder.unfinished_file()
        with session.averaged():
            weights = session.adapter.changes()
        try:
            stated = write_run_file(
                new,
                self._plan,
                session.base,
                weights,
                step=step,
                tokens=WORDS_IN_CHUNK * session.embeddings.chunks,
                started_at=started_at,
                validation_loss=None,
                identity_key=EXPORT_KEY,
                progress=Silence(),
            )
            if stated:
                forget_run(file)
            else:  # The record comes first: a kill at any time leaves no file that its run does not know.
                file.unlink(missing_ok=True)
                record_run(file, self._plan.identity, content=new)
            rename_whole(new, file)
        finally:
            new.unlink(missing_ok=True)
        if self._section.keep is not None:
            own = [file for done, file in self._files().items() if done <= step and self._own(file)]
            for old in own[: -self._section.keep]:
                _remove(old)

    def _due(self, step: int) -> bool:
        return self._moments.due(step) and 0 < step < self._plan.steps

    def _setting(self, step: int) -> str:
        """The setting by which the file of ``step`` is due."""
        every = self._section.save_every
        if every and step % every == 0:
            return f"output.save_every = {every}"
        return f"output.save_every_epochs = {self._section.save_every_epochs}"

    def _name(self, step: int) -> Path:
        return self._output.with_name(f"{self._output.stem}-{step:06}.safetensors")

    def _files(self) -> dict[int, Path]:
        """Step -> file, in order of the steps, of every file that has the name of one on the way."""
        pattern = re.compile(re.escape(self._output.stem) + r"-(\d{6,})\.safetensors")
        place = self._output.parent
        names = (pattern.fullmatch(file.name) for file in (place.iterdir() if place.is_dir() else ()))
        steps = sorted(int(name[1]) for name in names if name and self._name(int(name[1])).name == name[0])
        return {step: self._name(step) for step in steps}

    def _own(self, file: Path) -> bool:
        """Whether this run wrote ``file``, on whatever device."""
        writer, identity = _writer(file), self._plan.identity
        return writer is not None and not identity.differences(writer.anywhere())


def _writer(file: Path) -> RunIdentity | None:
    """The run that wrote ``file`` on its way; None where that is not known."""
    try:
        return RunIdentity.from_json(read_header(file, ResumeError).metadata.get(EXPORT_KEY) or recorded_run(file))
    except (ResumeError, OSError, ValueError, KeyError, TypeError):
        return None


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    forget_run(file)
