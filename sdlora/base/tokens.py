"""Prompts as tokens: chunks of 75 between a start and an end mark, as kohya's trainer and A1111 cut them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import TOKENS_IN_CHUNK, WORDS_IN_CHUNK
from .base import Base, TextEncoder

COMMA_REACH = 20
"""A chunk that is full ends at its last comma where that is at most so many tokens back (A1111's default)."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Words that share a weight."""

    text: str
    weight: float = 1.0
    opens_chunk: bool = False
    """Whether what follows begins a new chunk: BREAK. Its own text is not read then."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """``ids`` (chunks, 77) int64 and ``weights`` (chunks, 77) float32, on the CPU."""

    ids: Tensor
    weights: Tensor

    @property
    def chunks(self) -> int:
        return self.ids.shape[0]


PromptTokens = tuple[Tokens, ...]
"""For each text encoder of the base."""


def plain(text: str) -> tuple[Span, ...]:
    """A caption or prompt in which brackets are brackets."""
    return (Span(text=text),)


def tokenize(base: Base, prompt: Sequence[Span], *, limit: int | None = None) -> PromptTokens:
    """Tokens for every text encoder; what is behind ``limit`` tokens is cut off (``token_count`` tells)."""
    return tuple(_chunked(encoder, prompt, limit) for encoder in base.text_encoders)


def token_count(base: Base, text: str) -> int:
    """How many tokens ``text`` has, at most, in one of the base's encoders; marks and filling not counted."""
    return max(len(_ids(encoder, text)) for encoder in base.text_encoders)


def padded(base: Base, tokens: PromptTokens, chunks: int) -> PromptTokens:
    """``tokens`` with empty chunks behind, so that there are ``chunks`` of them."""
    return tuple(
        Tokens(
            ids=torch.cat([own.ids, *[_chunk_ids(encoder, [])] * (chunks - own.chunks)]),
            weights=torch.cat([own.weights, torch.ones(chunks - own.chunks, TOKENS_IN_CHUNK)]),
        )
        for encoder, own in zip(base.text_encoders, tokens, strict=True)
    )


def _ids(encoder: TextEncoder, text: str) -> list[int]:
    return encoder.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _chunk_ids(encoder: TextEncoder, words: Sequence[int]) -> Tensor:
    row = [encoder.tokenizer.bos_token_id, *words, encoder.tokenizer.eos_token_id]
    return torch.tensor([row + [encoder.pad_id] * (TOKENS_IN_CHUNK - len(row))])


def _chunked(encoder: TextEncoder, prompt: Sequence[Span], limit: int | None) -> Tokens:
    commas = set(_ids(encoder, ","))
    chunks: list[list[tuple[int, float]]] = []
    current: list[tuple[int, float]] = []
    left = limit
    for span in prompt:
        if span.opens_chunk:
            chunks.append(current)
            current = []
            continue
        ids = _ids(encoder, span.text)[:left]
        left = None if left is None else left - len(ids)
        for word in ids:
            if len(current) == WORDS_IN_CHUNK:
                current, rest = _split_at_comma(current, commas, word)
                chunks.append(current)
                current = rest
            current.append((word, span.weight))
    if current or not chunks:
        chunks.append(current)
    weights = torch.ones(len(chunks), TOKENS_IN_CHUNK)
    for row, chunk in zip(weights, chunks, strict=True):
        row[1 : 1 + len(chunk)] = torch.tensor([weight for _, weight in chunk])
    return Tokens(ids=torch.cat([_chunk_ids(encoder, [word for word, _ in c]) for c in chunks]), weights=weights)


def _split_at_comma(
    chunk: list[tuple[int, float]], commas: set[int], following: int
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The part that stays, and the part behind the last comma that moves to the next chunk."""
    if following in commas:
        return chunk, []
    for back in range(1, COMMA_REACH + 1):
        if chunk[-back][0] in commas:
            cut = len(chunk) - back + 1
            return chunk[:cut], chunk[cut:]
    return chunk, []
