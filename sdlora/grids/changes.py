"""What one value of an axis does to an image to be drawn, for each kind of axis."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LoraFileError
from ..generation.lora_choice import MOST_WEIGHT, LoraChoice
from ..generation.request import MAX_SEED, ImageRequest
from ..generation.samplers import read_sampler
from ..generation.start_image import StartImage


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An image to be drawn, and the LoRAs that it is drawn with."""

    request: ImageRequest
    loras: tuple[LoraChoice, ...]


Change = Callable[[Draft], Draft]
LAST = "last"
"""A value of the axis ``step``: the file of the end of the run."""
_STEP = re.compile(r"-\d{6}$")
"""How the name of a LoRA file that a training wrote on its way ends."""


def set_field(field: str, value: Any) -> Change:
    """Set a field of the request."""
    return lambda draft: replace(draft, request=replace(draft.request, **{field: value}))


def set_seed(value: float) -> Change:
    """Set the seed. Raises ``ValueError`` where it is out of range."""
    if not 0 <= value <= MAX_SEED:
        raise ValueError(f"{value:.0f} is not a seed from 0 to {MAX_SEED}")
    return set_field("seed", int(value))


def set_size(text: str) -> Change:
    """Set width and height from ``512`` or ``512x768``. Raises ``ValueError`` for anything else."""
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size; expected 512 or 512x768")
    return set_field("size", (int(match[1]), int(match[2] or match[1])))


def set_sampler(text: str) -> Change:
    """Set the sampler, and the schedule where the name holds one, as A1111's ``DPM++ 2M Karras`` does.

    Names that there are none of are for ``check_requests`` to report, as those of ``set_schedule``.
    """
    name, schedule = read_sampler(text)

    def change(draft: Draft) -> Draft:
        request = replace(draft.request, sampler=name, schedule=schedule or draft.request.schedule)
        return replace(draft, request=request)

    return change


def set_schedule(text: str) -> Change:
    """Set the spread of the steps; ``auto`` leaves it to the sampler."""
    return set_field("schedule", None if text == "auto" else read_sampler(ImageRequest.sampler, text)[1])


def set_strength(value: float) -> Change:
    """Set how much of the image that is drawn over is repainted.

    Raises:
        ValueError: ``value`` is out of range.
    """
    if not 0 < value <= 1:
        raise ValueError(f"{value:g} is not a strength above 0 and at most 1")
    # Images of one start image are drawn together only where it is the same object.
    made: dict[int, StartImage] = {}

    def change(draft: Draft) -> Draft:
        start = draft.request.start
        if start is None:
            return draft
        start = made.setdefault(id(start), replace(start, strength=value))
        return replace(draft, request=replace(draft.request, start=start))

    return change


def add_lora(text: str) -> tuple[str, Change]:
    """A label, and the change that adds a LoRA, ``FILE[:UNET[:TE]]``; ``none`` adds nothing.

    Raises:
        ValueError: it cannot be read.
    """
    if text == "none":
        return "no LoRA", lambda draft: draft
    try:
        choice = LoraChoice.parse(text)
    except LoraFileError as error:
        raise ValueError(str(error)) from None
    label = choice.name if choice.unet == 1 else f"{choice.name} {choice.unet:g}"
    return label, lambda draft: replace(draft, loras=(*draft.loras, choice))


def weigh(target: str | None, value: float) -> Change:
    """Give ``value`` to the UNet of all LoRAs, or of those named ``target``; text encoders keep their ratio to it.

    Raises:
        ValueError: ``value`` is out of range.
    """
    if not abs(value) <= MOST_WEIGHT:
        raise ValueError(f"{value:g} is not a weight from -{MOST_WEIGHT} to {MOST_WEIGHT}")

    def weighted(lora: LoraChoice) -> LoraChoice:
        ratio = lora.text_encoder / lora.unet if lora.unet else 1.0
        return replace(lora, unet=value, text_encoder=value * ratio)

    return lambda draft: replace(
        draft, loras=tuple(weighted(lora) if target in (None, lora.name) else lora for lora in draft.loras)
    )


def take_step(target: str | None, text: str) -> Change:
    """Take, of each LoRA or of those named ``target``, the file that its training wrote after a step, or the ``last``.

    Raises:
        ValueError: neither a whole number nor ``last``.
    """
    if text != LAST and not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise ValueError(f"{text!r} is not a step; expected a whole number, or {LAST}")
    ending = "" if text == LAST else f"-{int(text):06}"

    def at_step(lora: LoraChoice) -> LoraChoice:
        return replace(lora, file=lora.file.with_name(f"{_STEP.sub('', lora.name)}{ending}{lora.file.suffix}"))

    return lambda draft: replace(
        draft, loras=tuple(at_step(lora) if target in (None, lora.name) else lora for lora in draft.loras)
    )


def replace_text(search: str, text: str) -> Change:
    """Replace ``search`` in the prompt and in the negative prompt, as A1111's Prompt S/R does."""

    def change(draft: Draft) -> Draft:
        request = draft.request
        prompt, negative = (part.replace(search, text) for part in (request.prompt, request.negative))
        return replace(draft, request=replace(request, prompt=prompt, negative=negative))

    return change
