"""Steps in a shape that fits into the device's memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor

from ..base.device_memory import out_of_memory, release_memory
from ..errors import DeviceMemoryError
from .session import TrainingSession
from .shortage import CLOSE_OTHERS
from .step_shape import StepShape

logger = logging.getLogger(__name__)


class FittedSteps:
    """Does the steps of an attached session; with ``train.fit``, in smaller shapes where memory runs out."""

    def __init__(self, session: TrainingSession):
        self.session = session
        """Attached; another one after memory ran out."""
        self._attached = ExitStack()
        self._attached.enter_context(session.attached())

    def close(self) -> None:
        """Detach the session."""
        self._attached.close()

    def step(self, step: int) -> Tensor:
        """As ``TrainingSession.step``. A step that runs out of memory is done again from its start, in the next shape.

        Raises:
            DeviceMemoryError: there is no smaller shape, or ``train.fit`` is false.
        """
        while True:
            shape = self.session.shape
            try:
                return self.session.step(step)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                smaller = shape.smaller()
                if smaller is None or not self.session.plan.config.train.fit:
                    raise DeviceMemoryError(_sentence(self.session, step)) from None
            # After the block nothing refers to the error any more, nor to the tensors of the step that it came from.
            logger.warning("step %d: out of memory with %s; from now on %s", step + 1, shape, smaller)
            self._go_on_with(smaller)

    def _go_on_with(self, shape: StepShape) -> None:
        self._attached.close()
        gc.collect()
        release_memory(self.session.base.device)
        self.session = replace(self.session, shape=shape)
        self._attached.enter_context(self.session.attached())


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
