"""Caption embeddings for the UNet: computed once for frozen text encoders, in each step for trained ones.

All captions are padded to the chunks of the longest, so embeddings do not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from ..base.base import Base
from ..base.conditioning import Conditioning
from ..base.encode import encode_prompts
from ..base.fingerprints import text_fingerprint
from ..base.tokens import COMMA_REACH, PromptTokens, Tokens, padded, plain, token_count, tokenize
from ..cache.keys import CacheKey, text_key
from ..cache.store import EncodedCache
from ..config.sections import Config
from ..data.examine import ExaminedImage
from ..families import TOKENS_IN_CHUNK, WORDS_IN_CHUNK

KEPT_BYTES = 2**29
"""Bytes of embeddings kept on the device; the least recently used are dropped and computed again."""
WRITTEN_BYTES = 2**30
"""Bytes of embeddings that a run writes to the disk: captions with random parts may never come again."""
KEPT_TOKENS = 8192
"""Number of captions whose tokens are kept."""


class CaptionEmbeddings(Protocol):
    """Turns captions into what the UNet is conditioned on."""

    @property
    def chunks(self) -> int:
        """Number of 77-token chunks to which every caption is padded."""
        ...

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """One row for each caption: ``context`` (b, 77 · chunks, width) in the base's dtype, on its device."""
        ...

    def token_ids(self, captions: Sequence[str]) -> tuple[np.ndarray, ...]:
        """What ``encode_ids`` takes for each text encoder, (b, chunks, 77) int64; () where the text encoders are frozen."""
        ...

    def close(self) -> None:
        """Bring the disk cache under its cap if anything was written to it."""
        ...


def open_caption_embeddings(
    base: Base, items: Iterable[ExaminedImage], config: Config, cache: EncodedCache
) -> CaptionEmbeddings:
    """Embeddings for the captions of ``items``, frozen if the text encoders have learning rate 0."""
    limit = config.data.max_token_length
    tokens = CaptionTokens(base, chunks=max([1, *(most_chunks(base, item, limit) for item in items)]), limit=limit)
    if config.optimizer.text_encoder_learning_rate:
        return TrainedEmbeddings(base, tokens)
    return FrozenEmbeddings(base, tokens, cache, encoders=text_fingerprint(base) if config.cache.disk else "")


class CaptionTokens:
    """Tokens of captions, all padded to ``chunks`` chunks; those of recent captions are kept."""

    def __init__(self, base: Base, *, chunks: int, limit: int):
        """``limit`` is the number of tokens after which a caption is cut off."""
        self.chunks = chunks
        self._base, self._limit = base, limit
        self.of = lru_cache(maxsize=KEPT_TOKENS)(self._tokenize)

    def _tokenize(self, caption: str) -> PromptTokens:
        tokens = padded(self._base, tokenize(self._base, plain(caption), limit=self._limit), self.chunks)
        return tuple(
            Tokens(ids=encoder.ids[: self.chunks], weights=encoder.weights[: self.chunks]) for encoder in tokens
        )


class TrainedEmbeddings:
    """For text encoders that are trained: computed in each step, differentiable."""

    def __init__(self, base: Base, tokens: CaptionTokens):
        self._base, self._tokens = base, tokens

    @property
    def chunks(self) -> int:
        return self._tokens.chunks

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """As in ``CaptionEmbeddings``, with gradients to the text encoders."""
        return encode_prompts(self._base, [self._tokens.of(caption) for caption in captions])

    def token_ids(self, captions: Sequence[str]) -> tuple[np.ndarray, ...]:
        """As in ``CaptionEmbeddings``."""
        prompts = [self._tokens.of(caption) for caption in captions]
        return tuple(np.stack([tokens.ids.numpy() for tokens in encoder]) for encoder in zip(*prompts, strict=True))

    def close(self) -> None:
        """Nothing is kept on disk."""


class FrozenEmbeddings:
    """For frozen text encoders: each caption is encoded once, kept on the device, and backed by the disk cache."""

    def __init__(self, base: Base, tokens: CaptionTokens, cache: EncodedCache, *, encoders: str):
        """``encoders`` is the fingerprint of the text encoders; "" if the cache keeps nothing."""
        self._base, self._tokens, self._cache, self._encoders = base, tokens, cache, encoders
        self._bytes_to_write = WRITTEN_BYTES
        width = base.unet.config["cross_attention_dim"]
        bytes_per_caption = tokens.chunks * TOKENS_IN_CHUNK * width * base.dtype.itemsize
        self._row = lru_cache(maxsize=max(64, KEPT_BYTES // bytes_per_caption))(self._look_up_or_encode)

    @property
    def chunks(self) -> int:
        return self._tokens.chunks

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """As in ``CaptionEmbeddings``, without gradients."""
        return Conditioning.stack([self._row(caption) for caption in captions])

    def token_ids(self, captions: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Nothing: a caption is encoded once."""
        return ()

    def close(self) -> None:
        """Bring the disk cache under its cap if anything was written to it."""
        self._cache.close()

    @torch.no_grad()
    def _look_up_or_encode(self, caption: str) -> Conditioning:
        """One row. Captions are encoded one by one, so rounding does not depend on the rest of a batch."""
        tokens = self._tokens.of(caption)
        key = self._key(tokens)
        found = self._cache.get(key)
        if found is not None:
            pooled = found["pooled"].to(self._base.device) if "pooled" in found else None
            return Conditioning(context=found["context"].to(self._base.device), pooled=pooled)
        row = encode_prompts(self._base, [tokens])
        self._bytes_to_write -= row.context.nbytes
        if self._bytes_to_write >= 0:
            self._cache.put(key, {"context": row.context} | ({} if row.pooled is None else {"pooled": row.pooled}))
        return row

    def _key(self, tokens: PromptTokens) -> CacheKey:
        return text_key(
            ids=[encoder.ids for encoder in tokens],
            weights=[encoder.weights for encoder in tokens],
            encoders=self._encoders,
            dtype=self._base.dtype,
            device=self._base.device,
        )


def most_chunks(base: Base, item: ExaminedImage, limit: int) -> int:
    """Number of chunks of the longest caption that can be drawn for ``item``, cut off after ``limit`` tokens."""
    rules, captions = item.source.rules, item.source.captions
    texts = rules.longest(captions)
    chunks = max(tokens.chunks for text in texts for tokens in tokenize(base, plain(text), limit=limit))
    if not (rules.shuffle_tags or rules.tag_dropout or rules.wildcards):
        return chunks
    # The positions of the commas decide how full a chunk gets before the next begins. In the worst case every chunk
    # except the last ends at a comma, as far back as that is allowed.
    longest = min(limit, max(token_count(base, text) for text in texts))
    if longest <= WORDS_IN_CHUNK:
        return chunks
    fewest_in_chunk = WORDS_IN_CHUNK - COMMA_REACH + 1
    return max(chunks, 2 + (longest - WORDS_IN_CHUNK - 1) // fewest_in_chunk)
