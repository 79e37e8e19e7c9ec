"""What callers from Python may write, read into records; anything else is refused with what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.sections import BaseSection
from ..errors import BaseModelError, LoraFileError, SdloraError
from .loras import LoraChoice
from .request import ImageRequest, first_seed
from .samplers import read_sampler

LoraArgument = str | Path | LoraChoice
"""``FILE[:UNET[:TE]]``, a path, or a choice."""


def base_argument(base: object) -> str | BaseSection:
    """``base`` as ``find_base`` takes it.

    Raises:
        BaseModelError: neither a path nor a section, such as a pipeline of diffusers.
    """
    if isinstance(base, str | BaseSection):
        return base
    if isinstance(base, Path):
        return str(base)
    raise BaseModelError(
        f"base is a {type(base).__name__}; expected 'mini', the path of a checkpoint file or diffusers folder, or a "
        "BaseSection"
    )


def lora_choices(loras: LoraArgument | Sequence[LoraArgument]) -> list[LoraChoice]:
    """One choice for each of ``loras``, which may be a single one.

    Raises:
        LoraFileError: something else, or a weight that is not a number between -10 and 10.
    """
    several = [loras] if isinstance(loras, str | Path | LoraChoice) else list(loras)
    wrong = [lora for lora in several if not isinstance(lora, str | Path | LoraChoice)]
    if wrong:
        raise LoraFileError(
            f"loras holds a {type(wrong[0]).__name__}; expected 'FILE[:UNET[:TE]]', a Path or a LoraChoice"
        )
    return [lora if isinstance(lora, LoraChoice) else LoraChoice.parse(str(lora)) for lora in several]


def constant_choices(loras: LoraArgument | Sequence[LoraArgument]) -> list[LoraChoice]:
    """As ``lora_choices``, for work that has no steps.

    Raises:
        LoraFileError: as ``lora_choices``; also one line for each whose weight changes with the steps.
    """
    choices = lora_choices(loras)
    varying = [choice for choice in choices if choice.varies]
    if varying:
        raise LoraFileError(
            [
                f"{choice.file}: a start, a stop or a curve needs the steps of sdlora.generate; remove it here"
                for choice in varying
            ]
        )
    return choices


def image_requests(
    prompts: str | Sequence[str],
    *,
    seed: int | None,
    count: int,
    size: int | tuple[int, int] | None,
    negative: str,
    steps: int,
    cfg: float,
    sampler: str,
    schedule: str | None,
) -> list[ImageRequest]:
    """``count`` requests for each prompt, with seeds from ``seed`` on.

    Raises:
        SdloraError: with one line for each argument of another type than expected.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    problems = []
    if not texts or not all(isinstance(text, str) for text in texts):
        problems.append(f"prompts {prompts!r}: expected a text, or a list of at least one")
    if not _whole(count) or count < 1:
        problems.append(f"count {count!r}: expected a whole number, at least 1")
    sides: Any = (size, size) if isinstance(size, int) else size
    if sides is not None and not (isinstance(sides, Sequence) and len(sides) == 2 and all(map(_whole, sides))):
        problems.append(f"size {size!r}: expected pixels, 512 or (512, 768) for width and height")
    if not _whole(steps):
        problems.append(f"steps {steps!r}: expected a whole number, at least 1")
    if problems:
        raise SdloraError(problems)
    named, spread = read_sampler(sampler, schedule)
    first = first_seed(seed, count=count)
    width_height = None if sides is None else (sides[0], sides[1])
    return [
        ImageRequest(
            prompt=text,
            negative=negative,
            seed=first + number,
            steps=steps,
            cfg=cfg,
            size=width_height,
            sampler=named,
            schedule=spread,
        )
        for text in texts
        for number in range(count)
    ]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
