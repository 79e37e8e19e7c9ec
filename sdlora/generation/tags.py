"""LoRAs that prompts name in tags, ``<lora:name:0.8>``, and trigger words that prompts lack."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import LoraFileError, SdloraError
from ..formats.metadata import trigger_words
from ..formats.recipe import TAG, LoraTag
from .inversions import used_inversions
from .lora_choice import LoraChoice
from .lora_folder import LoraFolder
from .loras import WeightedLora
from .request import ImageRequest

_WORDS_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class TaggedRequest:
    """A request without tags, and the LoRAs that they named."""

    request: ImageRequest
    loras: tuple[LoraChoice, ...]


def read_tags(requests: Sequence[ImageRequest], folder: LoraFolder | None) -> list[TaggedRequest]:
    """Take the tags out of the prompts of ``requests`` and find their files in ``folder``; without one, tags stay.

    Raises:
        SdloraError: with one line for each tag that cannot be read, names no file or several, or has a wrong weight.
    """
    if folder is None:
        return [TaggedRequest(request=request, loras=()) for request in requests]
    problems: dict[str, None] = {}
    choices: dict[str, LoraChoice] = {}
    for match in {match[0]: match for request in requests for match in TAG.finditer(request.prompt)}.values():
        if match[1] == "hypernet":
            continue
        try:
            tag = LoraTag.parse(match[2])
            unet = 1.0 if tag.curve else tag.unet
            file = folder.find(tag.name)
            choice = LoraChoice(file=file, unet=unet, text_encoder=tag.text_encoder, curve=tag.curve)
            choices[match[0]] = choice.with_options(tag.more, match[0])
        except (ValueError, LoraFileError) as error:
            text = str(error)
            problems[f"prompt: {text if text.startswith(match[0]) else f'{match[0]}: {text}'}"] = None
    if problems:
        raise SdloraError(list(problems))
    return [_without_tags(request, choices) for request in requests]


def _without_tags(request: ImageRequest, choices: dict[str, LoraChoice]) -> TaggedRequest:
    found = [choices[match[0]] for match in TAG.finditer(request.prompt) if match[0] in choices]
    if not found:
        return TaggedRequest(request=request, loras=())
    prompt = TAG.sub(lambda match: "" if match[0] in choices else match[0], request.prompt)
    prompt = re.sub(r"[ \t]{2,}", " ", prompt).strip()
    return TaggedRequest(request=replace(request, prompt=prompt), loras=tuple(found))


def check_named_once(choices: Sequence[LoraChoice]) -> None:
    """Raises ``LoraFileError`` with a line for each file that is named more than once for one image."""
    files = [choice.file.resolve() for choice in choices]
    twice = [choice for choice, file in zip(choices, files, strict=True) if files.count(file) > 1]
    if twice:
        names = dict.fromkeys(str(choice.file) for choice in twice)
        raise LoraFileError(
            [f"{name}: is named more than once; name it once, with the sum of its weights" for name in names]
        )


def without_effect(cells: Iterable[tuple[ImageRequest, Sequence[WeightedLora]]]) -> list[str]:
    """A sentence, once, on each thing that will have no effect, or hardly any, on an image of ``cells``.

    That is a LoRA whose trigger words the prompt lacks altogether, one that begins after the last step, a textual inversion
    that no prompt names, and a negative prompt without guidance.
    """
    return list(dict.fromkeys(line for request, loras in cells for line in _without_effect(request, loras)))


def _without_effect(request: ImageRequest, loras: Sequence[WeightedLora]) -> list[str]:
    said, passes = _missing_triggers(request.prompt, loras), [request.steps_taken]
    if request.hires is not None:
        passes.append(request.hires.steps_taken(request.steps))
    for choice in (lora.choice for lora in loras if lora.choice.varies):
        if not any(choice.factor(step, steps) for steps in passes for step in range(steps)):
            said.append(f"{choice.file}: the UNet is not changed in any of {max(passes)} steps: {choice.tag}")
    used = used_inversions(request)
    said += [
        f"{inversion.path}: the prompts do not have its word: {inversion.words[0]}"
        for inversion in request.inversions
        if inversion not in used
    ]
    if request.negative and not request.is_guided:
        said.append("cfg 1 switches guidance off: the negative prompt has no effect")
    return said


def _missing_triggers(prompt: str, loras: Sequence[WeightedLora]) -> list[str]:
    said, text = [], prompt.casefold()
    for lora in loras:
        words = trigger_words(lora.fitted.file.metadata)
        if words and not any(word.casefold() in text for word in words):
            several = "words are" if len(words) > 1 else "word is"
            said.append(
                f"{lora.choice.file}: its trigger {several} not in the prompt: {', '.join(words[:_WORDS_NAMED])}"
            )
    return said
