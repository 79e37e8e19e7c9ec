"""Ctrl-C, SIGTERM and a caller's event, as one flag that a run looks at after each step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


class InterruptFlag:
    """Set by Ctrl-C, by SIGTERM, or by the caller's event, which these leave alone.

    It has no lock: a signal may come while the handler of another one sets it.
    """

    terminated = False
    """Whether SIGTERM set it, in any process once they have compared."""

    def __init__(self, stop: threading.Event | None):
        self._pressed, self._stop = False, stop

    def set(self, number: int = signal.SIGINT) -> None:
        """Ask for a stop, as signal ``number`` does."""
        self._pressed = True
        if number == signal.SIGTERM:
            self.terminated = True

    def is_set(self) -> bool:
        """Whether a stop was asked for, in this process."""
        return self._pressed or (self._stop is not None and self._stop.is_set())


@contextmanager
def interrupt_flag(stop: threading.Event | None = None) -> Generator[InterruptFlag]:
    """A flag that ``stop`` sets and, in the main thread, Ctrl-C or SIGTERM; a second Ctrl-C ends at once.

    Further SIGTERMs change nothing: torchrun passes on the one that Slurm has sent to every process already.
    """
    flag = InterruptFlag(stop)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_interrupt(number: int, _: object) -> None:
        flag.set(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    for number in previous:
        signal.signal(number, on_interrupt)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
