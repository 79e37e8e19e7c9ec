"""What callers from Python may write, read into records; anything else is refused with what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ..config.sections import BaseSection
from ..errors import BaseModelError, LoraFileError, SdloraError
from .hires import hires_pass
from .inversions import EmbeddingArgument, read_inversions
from .loras import LoraChoice
from .numbers import count_problems, is_whole
from .prompt_file import PromptLine
from .request import ImageRequest, first_seed
from .samplers import read_sampler
from .start_image import ImageArgument, start_image

LoraArgument = str | Path | LoraChoice
"""``FILE[:UNET[:TE]]``, a path, or a choice."""
_LORA = "'FILE[:UNET[:TE]]', a Path or a LoraChoice"


class SamplingOptions(TypedDict, total=False):
    """How ``generate`` samples, besides the sampler."""

    schedule: str | None
    """Spread of the steps over the noise levels, a name of ``schedules.SCHEDULES`` or A1111's; by default the sampler's."""
    guidance_rescale: float
    """How far guided predictions get the contrast of unguided ones back, from 0 (not at all, the default) to 1."""


class DrawingOptions(SamplingOptions, total=False):
    """What else ``generate`` takes: an image to draw over, a second pass, textual inversions."""

    image: ImageArgument | None
    """The image that is drawn over: a file, or an image of Pillow."""
    strength: float | None
    """How much of it is repainted: the share of the steps that are taken, above 0 and at most 1; 0.75 by default."""
    mask: ImageArgument | None
    """What of it is repainted: white is repainted, black stays."""
    mask_blur: int | None
    """Radius in pixels over which the edge of the mask is mixed; 4 by default."""
    hires: float | None
    """Factor of a second pass at a higher resolution, above 1."""
    hires_strength: float | None
    """How much the second pass repaints, above 0 and at most 1; 0.7 by default."""
    hires_steps: int | None
    """Steps that the second pass takes; by default as many as the first."""
    hires_upscaler: str | None
    """How the first image is enlarged, a name of ``hires.UPSCALERS``; ``latent`` by default."""
    embeddings: EmbeddingArgument | Sequence[EmbeddingArgument]
    """Files of textual inversions; prompts use them by the file's name or their token."""


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
    if not isinstance(loras, Iterable | Path | LoraChoice):
        raise LoraFileError(
            f"loras is a {type(loras).__name__}; expected {_LORA}, or a list of them, which may be empty"
        )
    several = [loras] if isinstance(loras, str | Path | LoraChoice) else list(loras)
    wrong = [lora for lora in several if not isinstance(lora, str | Path | LoraChoice)]
    if wrong:
        raise LoraFileError(f"loras holds a {type(wrong[0]).__name__}; expected {_LORA}")
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


PromptArgument = str | PromptLine
"""A prompt, or one with values of its own (``read_prompts``)."""


def image_requests(
    prompts: PromptArgument | Sequence[PromptArgument],
    *,
    seed: int | None,
    count: int,
    size: int | tuple[int, int] | None,
    negative: str,
    steps: int,
    cfg: float,
    sampler: str,
    schedule: str | None = None,
    guidance_rescale: float = 0.0,
    image: ImageArgument | None = None,
    strength: float | None = None,
    mask: ImageArgument | None = None,
    mask_blur: int | None = None,
    hires: float | None = None,
    hires_strength: float | None = None,
    hires_steps: int | None = None,
    hires_upscaler: str | None = None,
    embeddings: EmbeddingArgument | Sequence[EmbeddingArgument] = (),
) -> list[ImageRequest]:
    """``count`` requests for each prompt, with seeds from ``seed`` on.

    Raises:
        SdloraError: with one line for each argument of another type than expected, and each file that cannot be read.
    """
    texts = _listed(prompts)
    problems = _no_texts(negative=negative, sampler=sampler, schedule="" if schedule is None else schedule)
    if not texts or not all(isinstance(text, str | PromptLine) for text in texts):
        problems.append(f"prompts {prompts!r}: expected a text, or a list of at least one")
    problems += count_problems(count=count)
    sides: Any = (size, size) if isinstance(size, int) else size
    if sides is not None and not (isinstance(sides, Sequence) and len(sides) == 2 and all(map(is_whole, sides))):
        problems.append(f"size {size!r}: expected pixels, 512 or (512, 768) for width and height")
    if not is_whole(steps):
        problems.append(f"steps {steps!r}: expected a whole number, at least 1")
    start, second, inversions = None, None, ()
    try:
        inversions = read_inversions(embeddings)
    except SdloraError as error:
        problems += error.problems
    try:
        start = start_image(image, strength=strength, mask=mask, mask_blur=mask_blur)
    except SdloraError as error:
        problems += error.problems
    try:
        second = hires_pass(hires, strength=hires_strength, steps=hires_steps, upscaler=hires_upscaler)
    except SdloraError as error:
        problems += error.problems
    if problems:
        raise SdloraError(problems)
    named, spread = read_sampler(sampler, schedule)
    lines = [text if isinstance(text, PromptLine) else PromptLine(prompt=text) for text in texts]
    common = ImageRequest(
        prompt="",
        negative=negative,
        seed=first_seed(seed, count=max(line.count or count for line in lines)),
        steps=steps,
        cfg=cfg,
        size=None if sides is None else (sides[0], sides[1]),
        sampler=named,
        schedule=spread,
        guidance_rescale=guidance_rescale,
        start=start,
        hires=second,
        inversions=inversions,
    )
    return [request for line in lines for request in line.requests(common, count)]


def _listed(prompts: PromptArgument | Sequence[PromptArgument]) -> list[PromptArgument]:
    several = [prompts] if isinstance(prompts, str | PromptLine) else prompts
    return list(several) if isinstance(several, Iterable) else []


def _no_texts(**values: object) -> list[str]:
    return [f"{name} {value!r}: expected a text" for name, value in values.items() if not isinstance(value, str)]
