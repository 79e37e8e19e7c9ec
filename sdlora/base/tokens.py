"""Prompts as tokens: chunks of 75 between a start and an end token, split as kohya's trainer and A1111 do."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import TOKENS_IN_CHUNK, WORDS_IN_CHUNK
from .base import Base, TextEncoder

COMMA_REACH = 20
"""A full chunk ends at its last comma if that is at most this many tokens back (A1111's default)."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Part of a prompt whose words share a weight."""

    text: str
    weight: float = 1.0
    opens_chunk: bool = False
    """BREAK: what follows begins a new chunk. ``text`` is ignored then."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A prompt for one text encoder: ``ids`` (chunks, 77) int64 and ``weights`` (chunks, 77) float32, on the CPU."""

    ids: Tensor
    weights: Tensor

    @property
    def chunks(self) -> int:
        """Number of chunks of 77 tokens."""
        return self.ids.shape[0]


PromptTokens = tuple[Tokens, ...]
"""One entry for each text encoder of the base, in their order."""


def plain(text: str) -> tuple[Span, ...]:
    """``text`` as a prompt without syntax: brackets are ordinary characters."""
    return (Span(text=text),)


def tokenize(base: Base, prompt: Sequence[Span], *, limit: int | None = None) -> PromptTokens:
    """Tokens for every text encoder; everything after ``limit`` tokens is cut off (``token_count`` counts them)."""
    return tuple(_tokenize(encoder, prompt, limit) for encoder in base.text_encoders)


def token_count(base: Base, text: str) -> int:
    """Number of tokens of ``text`` without start, end and padding; the largest of the base's text encoders."""
    return max(len(_ids(encoder, text)) for encoder in base.text_encoders)


def padded(base: Base, tokens: PromptTokens, chunks: int) -> PromptTokens:
    """``tokens`` followed by empty chunks, up to ``chunks`` of them: ids and weights (chunks, 77)."""
    return tuple(
        Tokens(
            ids=torch.cat([prompt.ids, *[_chunk_ids(encoder, [])] * (chunks - prompt.chunks)]),
            weights=torch.cat([prompt.weights, torch.ones(chunks - prompt.chunks, TOKENS_IN_CHUNK)]),
        )
        for encoder, prompt in zip(base.text_encoders, tokens, strict=True)
    )


def _ids(encoder: TextEncoder, text: str) -> list[int]:
    return encoder.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _pieces(encoder: TextEncoder, text: str) -> Iterator[tuple[int, ...]]:
    """The tokens of ``text``, one by one; all vectors of a textual inversion together."""
    for part in [text] if encoder.word_vectors is None else encoder.word_vectors.split(text):
        if isinstance(part, str):
            yield from ((word,) for word in _ids(encoder, part))
        else:
            yield part


def _chunk_ids(encoder: TextEncoder, words: Sequence[int]) -> Tensor:
    """At most 75 token ids -> (1, 77) int64 with start, end and padding."""
    row = [encoder.tokenizer.bos_token_id, *words, encoder.tokenizer.eos_token_id]
    return torch.tensor([row + [encoder.pad_id] * (TOKENS_IN_CHUNK - len(row))])


def _tokenize(encoder: TextEncoder, prompt: Sequence[Span], limit: int | None) -> Tokens:
    commas = set(_ids(encoder, ","))
    chunks: list[list[tuple[int, float]]] = []
    current: list[tuple[int, float]] = []
    tokens_left = sys.maxsize if limit is None else limit
    for span in prompt:
        if span.opens_chunk:
            chunks.append(current)
            current = []
            continue
        for piece in _pieces(encoder, span.text):
            tokens_left -= len(piece)
            if tokens_left < 0:
                break
            if len(current) + len(piece) > WORDS_IN_CHUNK:
                # As in A1111, the vectors of a word stay together, and a full chunk before them is not split.
                current, rest = _split_at_comma(current, commas, piece[0]) if len(piece) == 1 else (current, [])
                chunks.append(current)
                current = rest
            current += [(word, span.weight) for word in piece]
    if current or not chunks:
        chunks.append(current)
    weights = torch.ones(len(chunks), TOKENS_IN_CHUNK)
    for row, chunk in zip(weights, chunks, strict=True):
        row[1 : 1 + len(chunk)] = torch.tensor([weight for _, weight in chunk])
    return Tokens(
        ids=torch.cat([_chunk_ids(encoder, [word for word, _ in chunk]) for chunk in chunks]), weights=weights
    )


def _split_at_comma(
    chunk: list[tuple[int, float]], commas: set[int], following: int
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The part that stays in the chunk, and the part after its last comma, which moves to the next chunk."""
    if following in commas:
        return chunk, []
    for back in range(1, COMMA_REACH + 1):
        if chunk[-back][0] in commas:
            cut = len(chunk) - back + 1
            return chunk[:cut], chunk[cut:]
    return chunk, []
