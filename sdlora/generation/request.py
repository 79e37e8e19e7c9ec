"""The request for an image. Every default of generating is written here and nowhere else."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import SdloraError
from .samplers import sampler_problems

if TYPE_CHECKING:
    from ..base.checkpoint import BaseCheckpoint

MAX_CFG = 100
MAX_SEED = 2**32 - 1
RANDOM_SEED = -1
"""As A1111 writes it; None means the same."""


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
    schedule: str | None = None
    """A name of ``schedules.SCHEDULES``; None is the base's own spacing of timesteps, or else the sampler's."""

    def size_on(self, base: BaseCheckpoint) -> tuple[int, int]:
        """Width and height in pixels when generated on ``base``."""
        return self.size or (base.resolution, base.resolution)


def first_seed(seed: int | None, *, count: int) -> int:
    """``seed`` itself, or a random one where it is None or -1, so that ``count`` seeds from it on are allowed.

    Raises:
        SdloraError: any other value that is not a whole number from 0 to ``MAX_SEED``.
    """
    if seed is None or (seed == RANDOM_SEED and isinstance(seed, int)):
        return secrets.randbelow(MAX_SEED - count + 2)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise SdloraError(f"seed {seed!r}: expected a whole number from 0 to {MAX_SEED}, or -1 for a random one")
    return seed


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
    problems += sampler_problems(request.sampler, request.schedule, request.steps, base.schedule.prediction)
    if not isinstance(request.cfg, int | float) or not 0 <= request.cfg <= MAX_CFG:
        problems.append(f"cfg {request.cfg}: expected a number from 0 to {MAX_CFG}")
    if request.steps < 1:
        problems.append(f"steps {request.steps}: at least 1 is needed")
    return problems
