"""What other programs read in a prompt and this one does not."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from ..errors import SdloraError
from ..formats.recipe import TAG, LoraTag
from .prompt_editing import text_outside
from .wildcards import WILDCARD

logger = logging.getLogger(__name__)

_MALFORMED = re.compile(r"(?<!\\)\[[^\[\]]*(?:\|[^\[\]]*|:\s*[\d.]+\s*)\]")
"""Looks like ``[a:b:0.5]`` or ``[a|b]``, among what A1111 does not read as such."""
_AND = re.compile(r"\bAND\b")
_OTHER_TAG = re.compile(r"<\s*[A-Za-z]\w*\s*:[^<>]+>")
"""What A1111 takes for the tag of an extension."""


def check_syntax(prompts: Iterable[str], negatives: Iterable[str] = ()) -> None:
    """Log one warning for each construct that is read as text, in prompts whose alternatives were drawn.

    Raises:
        SdloraError: a tag such as ``<lora:name:1>``, which would load nothing here; with the option to use instead.
    """
    negative = list(dict.fromkeys(negatives))
    texts = list(dict.fromkeys((*prompts, *negative)))
    problems = dict.fromkeys(_refusal(match) for text in texts for match in TAG.finditer(text))
    if problems:
        raise SdloraError(list(problems))
    for written in dict.fromkeys(match[0] for text in texts for match in WILDCARD.finditer(text)):
        logger.warning(
            "prompt: %s: wildcards need sdlora generate --wildcards DIR (in Python wildcards=); it is read as text",
            written,
        )
    if any(_AND.search(text) for text in negative):
        logger.warning("prompt: AND in a negative prompt is not supported; it is read as text")
    for written in dict.fromkeys(match[0] for text in texts for match in _OTHER_TAG.finditer(text)):
        logger.warning("prompt: %s: is no tag that is known, such as <lora:name:1>; it is read as text", written)
    malformed = [match[0] for text in texts for match in _MALFORMED.finditer(text_outside(text))]
    for written in dict.fromkeys(malformed):
        logger.warning(
            "prompt: %s: is neither [from:to:when], [to:when], [from::when] nor [a|b]; it is read as text", written
        )


def _refusal(match: re.Match[str]) -> str:
    if match[1] == "hypernet":
        return f"prompt: {match[0]}: hypernetworks are not supported; remove the tag"
    try:
        file = LoraTag.parse(match[2]).option
    except ValueError as error:
        return f"prompt: {match[0]}: {error}; a tag loads nothing here; remove it and use --lora FILE:WEIGHT"
    return (
        f"prompt: {match[0]}: a tag loads nothing here; remove it and use --lora {file} (in Python loras=['{file}']), or "
        "write it in the prompt of generate and name the folder of its file with --lora-dir"
    )
