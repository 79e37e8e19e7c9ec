"""Words with vectors of their own in a text encoder: what textual inversion trains (Gal et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class WordVectors:
    """The words of one text encoder. In a prompt's tokens their vectors have ids above the encoder's vocabulary."""

    first_id: int
    """Id of the first vector: the size of the vocabulary."""
    ids: Mapping[str, tuple[int, ...]]
    """Word, as ``normal`` writes it -> ids of its vectors."""
    vectors: Tensor
    """(n, width) float32, in main memory."""

    @classmethod
    def of(cls, words: Mapping[str, Tensor], first_id: int) -> WordVectors:
        """Make them from word -> its vectors, (n, width)."""
        ids, following = {}, first_id
        for word, vectors in words.items():
            ids[normal(word)] = tuple(range(following, following + len(vectors)))
            following += len(vectors)
        return cls(first_id=first_id, ids=ids, vectors=torch.cat([vectors.float().cpu() for vectors in words.values()]))

    def split(self, text: str) -> Iterator[str | tuple[int, ...]]:
        """``text`` in pieces: ordinary text, and the ids of each word with vectors."""
        position = 0
        for match in word_pattern(self.ids).finditer(text):
            yield text[position : match.start()]
            yield self.ids[normal(match[1])]
            position = match.end()
        yield text[position:]

    @contextmanager
    def inserted(self, embedding: nn.Module, ids: Tensor) -> Generator[Tensor]:
        """Within the block, ``embedding``, the layer that looks tokens up, gives the vectors their places in ``ids``.

        Yields the ids, (n, 77), for the model, which knows none above its vocabulary: in each place of a vector the first
        of all tokens, so that a search for the end token is not misled.
        """
        places = ids >= self.first_id

        def put(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            vectors = self.vectors.to(output.device, output.dtype)[(ids - self.first_id).clamp(min=0)]
            return torch.where(places[..., None], vectors, output)

        handle = embedding.register_forward_hook(put)
        try:
            yield ids.masked_fill(places, 0)
        finally:
            handle.remove()


def normal(word: str) -> str:
    """``word`` as it is compared: CLIP's tokenizer knows neither capitals nor kinds of spaces."""
    return " ".join(word.lower().split())


def word_pattern(words: Mapping[str, object]) -> re.Pattern[str]:
    """Finds ``words`` in a prompt, whole and longest first; group 1 is the word. ComfyUI's ``embedding:`` may precede it."""
    spelled = [r"\s+".join(map(re.escape, word.split())) for word in sorted(words, key=len, reverse=True)]
    bounded = [
        (r"(?<!\w)" if word[0].isalnum() or word[0] == "_" else "") + word + (r"(?!\w)" if word[-1].isalnum() else "")
        for word in spelled
    ]
    return re.compile(rf"(?:\bembedding:)?({'|'.join(bounded)})", re.IGNORECASE)
