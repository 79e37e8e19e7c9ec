"""Textual inversions on a base: which text encoder gets which vectors, and which prompts use them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..base.base import Base
from ..base.checkpoint import BaseCheckpoint
from ..base.inversion_fit import misfit, vectors_by_part
from ..base.word_vectors import WordVectors, normal, word_pattern
from ..errors import InversionFileError, SdloraError
from ..formats.inversion_file import Inversion, bundled_inversions, read_inversion
from .loras import WeightedLora
from .request import ImageRequest

logger = logging.getLogger(__name__)
_COMFYUI = re.compile(r"\bembedding:([^\s,()\[\]:]+)")
EmbeddingArgument = str | Path


def read_inversions(files: EmbeddingArgument | Sequence[EmbeddingArgument]) -> tuple[Inversion, ...]:
    """Read ``files``, one or several.

    Raises:
        SdloraError: with one line for each file that cannot be used, and each word that two files claim.
    """
    several = [files] if isinstance(files, str | Path) else list(files)
    problems, read = [], []
    for file in dict.fromkeys(several):
        if not isinstance(file, str | Path):
            problems.append(f"embeddings holds a {type(file).__name__}; expected the path of a file")
            continue
        try:
            read.append(read_inversion(Path(file).expanduser()))
        except InversionFileError as error:
            problems += error.problems
    owners: dict[str, Path] = {}
    for inversion in read:
        for word in inversion.words:
            if owners.setdefault(normal(word), inversion.path) != inversion.path:
                problems.append(f"{inversion.path}: {owners[normal(word)]} has the word {word} too; rename one of them")
    if problems:
        raise SdloraError(problems)
    return tuple(read)


def with_inversions(base: Base, requests: Sequence[ImageRequest], loras: Sequence[WeightedLora]) -> Base:
    """``base`` with the words of ``requests`` and those that came with ``loras``; ``base`` itself where there are none.

    One that came with a LoRA and does not fit is logged and left out.
    """
    inversions = {inversion: None for request in requests for inversion in request.inversions}
    for lora in loras:
        try:
            bundled = bundled_inversions(lora.fitted.file)
        except InversionFileError as error:
            logger.warning("%s; ignored", error)
            continue
        for inversion in bundled:
            if problem := misfit(inversion, base.checkpoint):
                logger.warning("%s; ignored", problem)
            else:
                inversions[inversion] = None
    _warn_of_missing(requests, inversions)
    if not inversions:
        return base
    encoders = []
    for encoder in base.text_encoders:
        words = _words(encoder.facts.part, inversions, base.checkpoint)
        vectors = WordVectors.of(words, encoder.model.config.vocab_size) if words else None
        encoders.append(replace(encoder, word_vectors=vectors))
    return replace(base, text_encoders=tuple(encoders))


def used_inversions(request: ImageRequest) -> list[Inversion]:
    """Those of the request's own that its prompt or its negative prompt names."""
    texts = (request.prompt, request.negative)
    return [
        inversion
        for inversion in request.inversions
        if any(word_pattern(dict.fromkeys(map(normal, inversion.words))).search(text) for text in texts)
    ]


def _words(part: str, inversions: Iterable[Inversion], checkpoint: BaseCheckpoint) -> dict[str, Tensor]:
    """Word -> vectors in the text encoder ``part``; of two with the same word, the first."""
    words: dict[str, Tensor] = {}
    for inversion in inversions:
        vectors = vectors_by_part(inversion, checkpoint).get(part)
        if vectors is not None:
            words |= {word: vectors for word in map(normal, inversion.words) if word not in words}
    return words


def _warn_of_missing(requests: Sequence[ImageRequest], inversions: Iterable[Inversion]) -> None:
    known = {normal(word) for inversion in inversions for word in inversion.words}
    texts = dict.fromkeys(text for request in requests for text in (request.prompt, request.negative))
    for match in dict.fromkeys(match for text in texts for match in _COMFYUI.findall(text)):
        if normal(match) not in known:
            logger.warning(
                "prompt: embedding:%s: no textual inversion of this name is given; it is read as text", match
            )
