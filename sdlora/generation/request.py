"""The request for an image. Every default of generating is written here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import SdloraError
from .samplers import SAMPLERS

if TYPE_CHECKING:
    from ..base.checkpoint import BaseCheckpoint


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image. The prompts are in A1111's syntax and of any length."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    cfg: float = 5.0
    """Classifier-free guidance scale; 1 switches guidance off."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, multiples of the base's ``size_step``; None is the base's own square."""
    sampler: str = "dpm++2m"
    """A name of ``samplers.SAMPLERS``."""

    def size_on(self, base: BaseCheckpoint) -> tuple[int, int]:
        """Width and height in pixels when generated on ``base``."""
        return self.size or (base.resolution, base.resolution)


def check_requests(requests: Sequence[ImageRequest], base: BaseCheckpoint) -> None:
    """Raise ``SdloraError`` with one line for each value that does not work on ``base``."""
    problems = [problem for request in requests for problem in _problems(request, base)]
    if problems:
        raise SdloraError(list(dict.fromkeys(problems)))


def _problems(request: ImageRequest, base: BaseCheckpoint) -> list[str]:
    problems, step = [], base.size_step
    width, height = request.size_on(base)
    if width % step or height % step or min(width, height) <= 0:
        problems.append(f"size {width}x{height}: width and height must be multiples of {step} pixels on {base.name}")
    if request.sampler not in SAMPLERS:
        problems.append(f"sampler {request.sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if request.steps < 1:
        problems.append(f"steps {request.steps}: at least 1 is needed")
    return problems
