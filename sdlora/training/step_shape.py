"""How a step is divided so that it fits into the device's memory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step holds in memory at once; it changes the time and memory of a run, and its result by rounding alone."""

    micro_batch: int
    """Images whose forward and backward pass is done at once, at most; their gradients add up over the batch."""
    checkpointing: bool
    """Whether the UNet computes its activations a second time instead of keeping them."""

    def __str__(self) -> str:
        images = f"{self.micro_batch} images at once" if self.micro_batch > 1 else "one image at once"
        return f"{images}, {'with' if self.checkpointing else 'without'} gradient checkpointing"

    def smaller(self) -> StepShape | None:
        """The next shape that needs less memory: half of the images at once, then checkpointing; None after that."""
        if self.micro_batch > 1:
            return StepShape(micro_batch=self.micro_batch // 2, checkpointing=self.checkpointing)
        return None if self.checkpointing else StepShape(micro_batch=1, checkpointing=True)

    def to_json(self) -> str:
        """As text for the metadata of a checkpoint."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StepShape:
        """The inverse of ``to_json``. Raises ``ValueError``, ``KeyError`` or ``TypeError`` for other text."""
        fields = json.loads(text)
        return cls(micro_batch=max(1, int(fields["micro_batch"])), checkpointing=bool(fields["checkpointing"]))
