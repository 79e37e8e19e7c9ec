"""Everything that sdlora raises for its users.

SdloraError              the input is at fault; the message says which, what was expected, what to do
├── ConfigError          a configuration file, key or value
├── DataError            images or captions
├── BaseModelError       a base checkpoint
├── LoraFileError        a LoRA file
├── CompatibilityError   a LoRA and a base that do not belong together
├── ResumeError          a half-done or finished run that does not fit the command
├── TargetError          a place that cannot be written to
├── CaptionerError       a captioning model
├── DeviceMemoryError    a device, or the main memory, with too little room for what was asked
├── TrainingError        a run that went numerically wrong
└── ProcessLostError     another of the processes that share a run has ended
Interrupted              stopped by the user, after a safe save
"""

from __future__ import annotations

from collections.abc import Sequence


class SdloraError(Exception):
    """The input is at fault. ``problems`` holds one line for each fault; the text is all of them."""

    exit_code = 1
    """Exit code of a command that ends with it."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(SdloraError):
    """A configuration file, key or value."""


class DataError(SdloraError):
    """Images or captions."""


class BaseModelError(SdloraError):
    """A base checkpoint."""


class LoraFileError(SdloraError):
    """A LoRA file."""


class InversionFileError(SdloraError):
    """A file of a textual inversion."""


class CompatibilityError(SdloraError):
    """A LoRA and a base that do not belong together."""


class ResumeError(SdloraError):
    """A half-done or finished run that does not match the command."""


class TargetError(SdloraError):
    """A file or folder that cannot be written."""


class CaptionerError(SdloraError):
    """A captioning model."""


class DeviceMemoryError(SdloraError):
    """A device, or the main memory, with too little room for what was asked."""


class TrainingError(SdloraError):
    """A run that went numerically wrong."""


class ProcessLostError(SdloraError):
    """Another of the processes that share a run has ended."""

    exit_code = 3


ERROR_MARK = "error: "
"""How each line begins in which a command reports a problem."""


def printed_problems(lines: Sequence[str]) -> list[str]:
    """The problems among the ``lines`` that a command has printed."""
    return [line.removeprefix(ERROR_MARK) for line in lines if line.startswith(ERROR_MARK)]


class Interrupted(Exception):
    """Stopped by the user; the work so far is saved, and the same command resumes."""

    def __init__(self, message: str = "", *, terminated: bool = False):
        """``terminated``: by SIGTERM."""
        self.terminated = terminated
        super().__init__(message)
