"""A process that stops, after saving, when the process that started it ends or asks it to.

Its standard input is the leash: a pipe that the other process holds open. It ends when that process closes it, and also when
that process is killed, on every system; so no run outlives its sweep.
"""

from __future__ import annotations

import signal

from ..training.launch import end_with_input


def hold() -> None:
    """From now on, an end of standard input interrupts the main thread as Ctrl-C does."""
    # A shell that starts a command in the background has it ignore Ctrl-C, and all processes that it starts. The processes
    # of Ray block it, and so do those that they start.
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    # Slurm signals every process of a job before its time is over. The process at the other end answers it.
    if hasattr(signal, "SIGUSR2"):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    end_with_input(signal.SIGINT)
