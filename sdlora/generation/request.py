"""The request for an image. Every default of generating is written here and nowhere else."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import SdloraError
from .hires import Hires
from .prompt_editing import prompt_parts
from .samplers import sampler_problems
from .start_image import StartImage

if TYPE_CHECKING:
    from ..base.checkpoint import BaseCheckpoint
    from ..formats.inversion_file import Inversion

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
    """Width and height in pixels, multiples of the base's ``latent_factor``; None is that of ``start``, else the base's own
    square."""
    sampler: str = "dpm++2m"
    """A name of ``samplers.SAMPLERS``."""
    schedule: str | None = None
    """A name of ``schedules.SCHEDULES``; None is the base's own spacing of timesteps, or else the sampler's."""
    guidance_rescale: float = 0.0
    """φ of Lin et al. 2024, section 3.4, from 0 to 1: how far guided predictions get the contrast of unguided ones back."""
    start: StartImage | None = None
    """The image that is drawn over, in image to image and inpainting."""
    hires: Hires | None = None
    """A second pass at a higher resolution."""
    prompt_template: str = ""
    """The prompt as written, where alternatives or wildcards in it were chosen; else empty."""
    negative_template: str = ""
    """Likewise of the negative prompt."""
    inversions: tuple[Inversion, ...] = ()
    """Textual inversions whose words the prompts may use."""

    def size_on(self, base: BaseCheckpoint) -> tuple[int, int]:
        """Width and height in pixels when generated on ``base``."""
        if self.size is None and self.start is not None:
            return self.start.size_on(base)
        return self.size or (base.resolution, base.resolution)

    def final_size_on(self, base: BaseCheckpoint) -> tuple[int, int]:
        """Width and height in pixels after the second pass, if there is one."""
        size = self.size_on(base)
        return size if self.hires is None else self.hires.size(size, base.latent_factor)

    @property
    def settings(self) -> ImageRequest:
        """All but prompts and seed: what images that are drawn together have in common."""
        return replace(self, prompt="", negative="", prompt_template="", negative_template="", seed=0)

    @property
    def is_guided(self) -> bool:
        """Whether the UNet predicts without the prompt too: for guidance, and for prompts of several parts."""
        return self.cfg != 1.0 or len(prompt_parts(self.prompt)) > 1

    @property
    def steps_taken(self) -> int:
        """Steps that are computed in the first pass."""
        return self.steps if self.start is None else self.start.steps_of(self.steps)

    @property
    def all_steps(self) -> int:
        """Steps that are computed in all passes."""
        return self.steps_taken + (0 if self.hires is None else self.hires.steps_taken(self.steps))


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
    if inversions := dict.fromkeys(inversion for request in requests for inversion in request.inversions):
        from ..base.inversion_fit import misfit

        problems += [problem for inversion in inversions if (problem := misfit(inversion, base))]
    if problems:
        raise SdloraError(list(dict.fromkeys(problems)))


def _problems(request: ImageRequest, base: BaseCheckpoint) -> list[str]:
    problems, step = [], base.latent_factor
    width, height = request.size_on(base)
    if width % step or height % step or min(width, height) <= 0:
        problems.append(f"size {width}x{height}: width and height must be multiples of {step} pixels on {base.name}")
    longest = max(request.steps, request.hires.schedule_steps(request.steps) if request.hires else 0)
    problems += sampler_problems(request.sampler, request.schedule, longest, base.schedule)
    if not isinstance(request.cfg, int | float) or not 0 <= request.cfg <= MAX_CFG:
        problems.append(f"cfg {request.cfg}: expected a number from 0 to {MAX_CFG}")
    if not isinstance(request.guidance_rescale, int | float) or not 0 <= request.guidance_rescale <= 1:
        problems.append(f"guidance_rescale {request.guidance_rescale}: expected a number from 0 to 1")
    if request.seed > MAX_SEED:
        problems.append(f"seed {request.seed}: the highest is {MAX_SEED}; begin with a lower one")
    if request.steps < 1:
        problems.append(f"steps {request.steps}: at least 1 is needed")
    elif request.start is not None and request.steps_taken < 1:
        strength, least = request.start.strength, math.ceil(1 / request.start.strength)
        problems.append(
            f"strength {strength:g} of {request.steps} steps is less than one step; use at least {least} steps"
        )
    if request.hires is not None:
        problems += _hires_problems(request, request.hires, base)
    return problems


def _hires_problems(request: ImageRequest, hires: Hires, base: BaseCheckpoint) -> list[str]:
    problems = []
    if request.start is not None:
        problems.append("hires is a second pass of text to image; without it, name a larger size for image to image")
    if request.final_size_on(base) == request.size_on(base):
        width, height = request.size_on(base)
        problems.append(
            f"hires {hires.scale:g}: {width}x{height} stays as it is in steps of {base.latent_factor} pixels"
        )
    if (needed := hires.schedule_steps(request.steps)) > base.schedule.timesteps:
        problems.append(
            f"hires_strength {hires.strength:g}: {hires.steps_taken(request.steps)} steps would be the last of {needed}, "
            f"and there are {base.schedule.timesteps}; use fewer hires_steps or a higher hires_strength"
        )
    return problems
