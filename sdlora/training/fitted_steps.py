"""Steps in a shape that fits into the device's memory, compiled where that works."""

from __future__ import annotations

import gc
import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor

from ..base.compiling import compiling_failed
from ..base.device_memory import out_of_memory, release_memory
from ..errors import DeviceMemoryError
from .session import TrainingSession
from .shortage import CLOSE_OTHERS

logger = logging.getLogger(__name__)


class FittedSteps:
    """Does the steps of an attached session; with ``train.fit``, in smaller shapes where memory runs out.

    Where compiling fails, it goes on without it.
    """

    def __init__(self, session: TrainingSession):
        self.session = session
        """Attached; another one after memory ran out or compiling failed."""
        self._attached = ExitStack()
        self._attached.enter_context(session.attached())

    def close(self) -> None:
        """Detach the session."""
        self._attached.close()

    def step(self, step: int) -> Tensor:
        """As ``TrainingSession.step``. A step that runs out of memory or cannot be compiled is done again from its start.

        Raises:
            DeviceMemoryError: there is no smaller shape, or ``train.fit`` is false.
        """
        while True:
            try:
                return self.session.step(step)
            except Exception as error:
                warning, following = _instead(self.session, step, error)
            # After the block nothing refers to the error any more, nor to the tensors of the step that it came from.
            logger.warning("step %d: %s", step + 1, warning)
            self._go_on_with(following)

    def _go_on_with(self, session: TrainingSession) -> None:
        self._attached.close()
        gc.collect()
        release_memory(session.base.device)
        self.session = session
        self._attached.enter_context(session.attached())


def _instead(session: TrainingSession, step: int, error: Exception) -> tuple[str, TrainingSession]:
    """After ``error`` in ``step``: what to say, and what to go on with. Raises where there is nothing."""
    if session.compiled and compiling_failed(error):
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"compiling failed, from now on without: {reason}", replace(session, compiled=False)
    if not out_of_memory(error):
        raise error
    shape = session.shape
    smaller = shape.smaller()
    if smaller is None or not session.plan.config.train.fit:
        raise DeviceMemoryError(_sentence(session, step)) from None
    return f"out of memory with {shape}; from now on {smaller}", replace(session, shape=smaller)


@contextmanager
def fitted(session: TrainingSession) -> Generator[FittedSteps]:
    """Within the block, ``session``, or one that needs less memory, is attached."""
    steps = FittedSteps(session)
    try:
        yield steps
    finally:
        steps.close()


def _sentence(session: TrainingSession, step: int) -> str:
    shape, config = session.shape, session.plan.config
    where = f"out of memory in step {step + 1} with {shape}"
    ways = []
    if shape.micro_batch > 1:
        ways.append(f"set train.micro_batch={shape.micro_batch // 2} (the same batches in more parts)")
    if not shape.checkpointing:
        ways.append("set train.gradient_checkpointing=true (slower)")
    if ways:
        ways.append("set train.fit=true, which finds out by itself")
        return f"{where}; {', or '.join(ways)}; then run the same command to go on"
    ways = ["a lower data.resolution or lora.rank"]
    if config.base.quantization == "none":
        ways.append('base.quantization="nf4"')
    if config.optimizer.text_encoder_learning_rate:
        ways.append("optimizer.text_encoder_learning_rate=0")
    return f"{where}; {CLOSE_OTHERS}, or start over (--restart) with {', or '.join(ways)}"
