"""The state of a half-done run, in a folder beside its output. A checkpoint that can be read is complete."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..base.checkpoint import BaseCheckpoint
from ..config.catalogue import default_settings
from ..config.sections import Config
from ..config.setting import DECIDES_RESUMING
from ..errors import ResumeError
from ..files import write_whole
from ..formats.run_names import RUN_SUFFIX, checkpoint_name, step_of_checkpoint
from ..formats.safetensors_file import read_header, serialise
from .step_shape import StepShape

KEPT = 2
"""Checkpoints that are kept, the newest."""
FORMAT = 2
"""Format number of ``RunIdentity.to_json``; raised when settings change their names or meaning. Format 1 has no number."""
PRECISION_SETTING, STEPS_SETTING = "train.precision", "train.steps"


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What must not change when a run is resumed."""

    config: Mapping[str, str]
    """``section.key`` -> value, for the settings that decide resuming; no paths, since it is written into the output."""
    dataset: str
    base: str
    format: int = FORMAT
    device: str | None = None
    """Type of the device as torch has it; None where it is not known, as in runs of earlier versions."""
    precision: str | None = None
    """Dtype that the base computes in, without ``torch.``; None where it is not known."""
    extended: tuple[int, ...] = ()
    """Steps of each extension, which ``config`` does not have."""

    @classmethod
    def of(cls, config: Config, *, dataset: str, base: BaseCheckpoint, start: str | None = None) -> RunIdentity:
        """The identity of a run by ``config``, on the images with the digest ``dataset``, on ``base``.

        ``start`` is the digest of the LoRA that it starts from.
        """
        settings = config.flat(DECIDES_RESUMING)
        settings["base.path"] = json.dumps(base.name)
        settings["lora.start_from"] = json.dumps(start)
        if config.validation.stop:  # Only then does it change the weights, when they are measured.
            settings["validation.every"] = json.dumps(config.validation.every)
        return cls(config=settings, dataset=dataset, base=base.fingerprint)

    def on(self, device: str, dtype: torch.dtype) -> RunIdentity:
        """This identity, on a type of device, computing in ``dtype``."""
        return replace(self, device=device, precision=str(dtype).removeprefix("torch."))

    def moved_to(self, other: RunIdentity) -> RunIdentity:
        """This identity, on the device and in the precision of ``other``."""
        config = {**self.config, PRECISION_SETTING: other.config[PRECISION_SETTING]}
        return replace(self, config=config, device=other.device, precision=other.precision)

    def with_length(self, planned: int, extended: tuple[int, ...]) -> RunIdentity:
        """This identity with ``planned`` steps, and ``extended`` by others."""
        return replace(self, config={**self.config, STEPS_SETTING: json.dumps(planned)}, extended=extended)

    @property
    def planned(self) -> int:
        """Steps without those of extensions. Raises ``ValueError`` or ``KeyError`` where they are not stated."""
        return int(self.config[STEPS_SETTING])

    def anywhere(self) -> RunIdentity:
        """This identity on whatever device."""
        return replace(self, device=None, precision=None)

    def differences(self, other: RunIdentity) -> list[str]:
        """One phrase for each difference between ``other``, the earlier run, and this one.

        That it was extended since then is none. A setting that an earlier version did not have counts with its default; a
        device or precision that is not known counts as the same.
        """
        if self.format != other.format:
            return ["another version of sdlora, with other settings, made it"]
        earlier = {**default_settings(), **other.config}
        found = [
            f"{key} was {_shown(earlier.get(key))}, is now {_shown(self.config.get(key))}"
            for key in sorted(self.config.keys() | other.config.keys())
            if self.config.get(key) != earlier.get(key)
        ]
        if self.extended[: len(other.extended)] != other.extended:
            found.append(f"it was extended by {_listed(other.extended)} steps, is now by {_listed(self.extended)}")
        if self.dataset != other.dataset:
            found.append("the images or captions have changed")
        if self.base != other.base:
            found.append("the base checkpoint has changed")
        computed = (("device", other.device, self.device), ("precision", other.precision, self.precision))
        found += [
            f"the {what} was {before}, is now {now}"
            for what, before, now in computed
            if before and now and before != now
        ]
        return found

    def to_json(self) -> str:
        """As text for the metadata of a file; equal identities give equal text."""
        fields = {**vars(self), "config": dict(self.config)}
        if not self.extended:  # Files of other runs stay as they were before there were extensions.
            del fields["extended"]
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RunIdentity:
        """The inverse of ``to_json``. Raises ``ValueError``, ``KeyError`` or ``TypeError`` for another text."""
        fields = json.loads(text)
        return cls(
            config=fields["config"],
            dataset=fields["dataset"],
            base=fields["base"],
            format=fields.get("format", 1),
            device=fields.get("device"),
            precision=fields.get("precision"),
            extended=tuple(fields.get("extended", ())),
        )


def _shown(value: str | None) -> str:
    return "not set" if value in (None, "null") else value


def _listed(extended: tuple[int, ...]) -> str:
    return " + ".join(map(str, extended)) or "none"


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """``step`` steps are done.

    ``tensors`` are the ``state()`` of the optimizer and of the validation, and the adapter's ``fixed``.
    """

    step: int
    started_at: float
    """Seconds since 1970 when the run started."""
    tensors: Mapping[str, torch.Tensor]
    shape: StepShape | None
    """Shape of its last step; None where it is not known."""
    processes: int = 1
    """Number of processes that shared its last step."""

    @classmethod
    def none(cls, started_at: float) -> Checkpoint:
        """That of a run which starts now."""
        return cls(step=0, started_at=started_at, tensors={}, shape=None)


RUN_KEY = "sdlora_run"
"""Metadata key of the output that holds its run's identity."""


def finished(output: Path, identity: RunIdentity) -> bool:
    """Whether ``output`` exists, made by a run of this identity on whatever device, with all its extensions.

    Raises:
        ResumeError: it exists, but another run made it; the message lists the differences.
    """
    if not output.exists():
        return False
    earlier = run_of(output)
    if earlier is None:
        differences = ["it is not the output of a training run of this program"]
    else:
        differences = identity.differences(earlier.anywhere())
    if differences:
        raise ResumeError(
            f"{output}: exists, and differs from what this run would make: {'; '.join(differences)}; "
            "choose another output.path, or replace it with --restart"
        )
    return earlier is not None and earlier.extended == identity.extended


def run_of(output: Path) -> RunIdentity | None:
    """The run that made ``output``; None where it does not exist or that is not known."""
    try:
        return RunIdentity.from_json(read_header(output, ResumeError).metadata.get(RUN_KEY) or recorded_run(output))
    except (ResumeError, OSError, ValueError, KeyError, TypeError):
        return None


def record_run(output: Path, identity: RunIdentity, *, content: Path | None = None) -> None:
    """Write ``NAME.run.json`` beside an output whose metadata do not state which run made it.

    ``content`` is a file with the same bytes, where the output itself is not there yet.
    """
    record = {"run": identity.to_json(), "sha256": _sha256(content or output)}
    write_whole(_record(output), json.dumps(record).encode())


def forget_run(output: Path) -> None:
    """Remove the file that ``record_run`` wrote."""
    _record(output).unlink(missing_ok=True)


def recorded_run(output: Path) -> str:
    """The identity that ``record_run`` wrote, as text.

    Raises:
        OSError, ValueError, KeyError: none is recorded for these bytes.
    """
    record = json.loads(_record(output).read_text(encoding="utf-8"))
    if record["sha256"] != _sha256(output):
        raise ValueError
    return record["run"]


def _record(output: Path) -> Path:
    return output.with_suffix(".run.json")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class RunFolder:
    """The folder ``NAME.resume`` beside ``NAME.safetensors``: the newest checkpoints of the run, then its last state."""

    def __init__(self, output: Path, identity: RunIdentity):
        self._folder = output.with_suffix(RUN_SUFFIX)
        self._output, self._identity = output, identity

    def newest(self, *, allow_device_change: bool = False) -> Checkpoint | None:
        """The newest complete checkpoint, tensors on the CPU; None if there is none.

        For a run that is being extended it may be the last state from before the extension.

        Raises:
            ResumeError: it belongs to a run with other settings, images or base, or, unless ``allow_device_change``, on
                another type of device or in another precision; the message lists the differences.
        """
        last = [self._last] if self._identity.extended else []
        for file in (*reversed(self._files()), *last):
            try:
                metadata = read_header(file, ResumeError).metadata
                earlier = RunIdentity.from_json(metadata["identity"])
                tensors = load_file(file)
                step, started_at = int(metadata["step"]), float(metadata["started_at"])
                shape = StepShape.from_json(metadata["shape"]) if "shape" in metadata else None
                processes = int(metadata.get("processes", 1))
            except (ResumeError, OSError, ValueError, KeyError, TypeError):
                continue
            moved = earlier.moved_to(self._identity)
            differences = self._identity.differences(moved if allow_device_change else earlier)
            if differences:
                accept = "" if self._identity.differences(moved) else "accept it with --allow-device-change, "
                raise ResumeError(
                    f"{self._output}: a half-done run differs: {'; '.join(differences)}; "
                    f"undo that, {accept}choose another output.path, or start over with --restart"
                )
            return Checkpoint(step=step, started_at=started_at, tensors=tensors, shape=shape, processes=processes)
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, whole or not at all, and remove the oldest."""
        metadata = {
            "identity": self._identity.to_json(),
            "step": str(checkpoint.step),
            "started_at": repr(checkpoint.started_at),
            "processes": str(checkpoint.processes),
            **({} if checkpoint.shape is None else {"shape": checkpoint.shape.to_json()}),
        }
        header, payload = serialise(checkpoint.tensors, metadata)
        write_whole(self._checkpoint(checkpoint.step), header, payload)
        for old in self._files()[:-KEPT]:
            old.unlink(missing_ok=True)

    def half_done(self) -> RunIdentity | None:
        """The run that left the newest checkpoint of a run that is not complete; None if there is none."""
        return next((run for file in reversed(self._files()) if (run := _writer(file)) is not None), None)

    def last_state(self) -> RunIdentity | None:
        """The complete run whose last state is kept; None if none is."""
        return _writer(self._last)

    def close(self, steps: int, *, keep: bool) -> None:
        """Remove the checkpoints of a run that is complete after ``steps``; its last state stays if ``keep``."""
        final = self._checkpoint(steps)
        if not keep:
            self.remove()
        elif final.exists():
            final.replace(self._last)
        elif self._files():  # The state after the last step could not be saved; that of an earlier run is of no use.
            self.remove()
        for file in (*self._files(), self.unfinished_file()):
            file.unlink(missing_ok=True)
        if not self._last.exists():
            self.remove()

    def unfinished_file(self) -> Path:
        """Where a file of the run is written that gets its place by a renaming; it is removed with the folder."""
        return self._folder / "unfinished.safetensors"

    def place(self) -> str:
        """Where the newest checkpoint is, as text; it may be that there is none."""
        files = self._files()
        return str(files[-1]) if files else "no checkpoint"

    def remove(self) -> None:
        """Remove the folder with every checkpoint."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _last(self) -> Path:
        return self._folder / "last.safetensors"

    def _checkpoint(self, step: int) -> Path:
        return self._folder / checkpoint_name(step)

    def _files(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(file for file in self._folder.iterdir() if step_of_checkpoint(file.name) is not None)


def _writer(checkpoint: Path) -> RunIdentity | None:
    try:
        return RunIdentity.from_json(read_header(checkpoint, ResumeError).metadata["identity"])
    except (ResumeError, OSError, ValueError, KeyError, TypeError):
        return None
