"""What the UNet is told of captions: computed in each step where the text encoders are trained, else once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from ..base.base import Base
from ..base.conditioning import Conditioning
from ..base.encode import encode_prompts
from ..base.fingerprints import text_fingerprint
from ..base.tokens import COMMA_REACH, PromptTokens, Tokens, padded, plain, token_count, tokenize
from ..cache.store import EncodedCache, text_key
from ..config.sections import Config
from ..data.items import Item
from ..families import TOKENS_IN_CHUNK, WORDS_IN_CHUNK

KEPT_BYTES = 2**29
"""Of embeddings, on the device; the least recently used are dropped and computed again."""
WRITTEN_BYTES = 2**30
"""Of embeddings, that a run puts on the disk: drawn captions may never come again."""
KEPT_TOKENS = 8192
"""Captions whose tokens are kept."""


class CaptionEmbeddings:
    """All captions get the chunks of the longest, so that what one is told does not hang on its neighbours in a batch."""

    def __init__(self, base: Base, items: Iterable[Item], config: Config, cache: EncodedCache):
        self._base, self._cache, self._limit = base, cache, config.data.max_token_length
        self.chunks = max([1, *(most_chunks(base, item, self._limit) for item in items)])
        self._tokens = lru_cache(maxsize=KEPT_TOKENS)(self._tokenized)
        self._frozen = config.optimizer.text_encoder_learning_rate == 0
        if self._frozen:
            width = base.unet.config["cross_attention_dim"]
            size = self.chunks * TOKENS_IN_CHUNK * width * base.dtype.itemsize
            self._rows = lru_cache(maxsize=max(64, KEPT_BYTES // size))(self._encoded)
            self._unwritten = WRITTEN_BYTES
            self._encoders = text_fingerprint(base) if config.cache.disk else ""

    def of(self, captions: Sequence[str]) -> Conditioning:
        """A row for each of ``captions``."""
        if self._frozen:
            return Conditioning.stack([self._rows(caption) for caption in captions])
        return encode_prompts(self._base, [self._tokens(caption) for caption in captions])

    def close(self) -> None:
        """Bring the cache under its cap, which what was encoded here may have taken it over."""
        self._cache.close()

    def _tokenized(self, caption: str) -> PromptTokens:
        tokens = padded(self._base, tokenize(self._base, plain(caption), limit=self._limit), self.chunks)
        return tuple(Tokens(ids=own.ids[: self.chunks], weights=own.weights[: self.chunks]) for own in tokens)

    @torch.no_grad()
    def _encoded(self, caption: str) -> Conditioning:
        """By itself, so that its numbers do not hang on what else is encoded; out of the cache where it is there."""
        tokens, base = self._tokens(caption), self._base
        key = text_key(
            ids=[own.ids for own in tokens],
            weights=[own.weights for own in tokens],
            encoders=self._encoders,
            dtype=base.dtype,
            device=base.device,
        )
        found = self._cache.get(key)
        if found is not None:
            pooled = found["pooled"].to(base.device) if "pooled" in found else None
            return Conditioning(context=found["context"].to(base.device), pooled=pooled)
        row = encode_prompts(base, [tokens])
        self._unwritten -= row.context.nbytes
        if self._unwritten >= 0:
            self._cache.put(key, {"context": row.context} | ({} if row.pooled is None else {"pooled": row.pooled}))
        return row


def most_chunks(base: Base, item: Item, limit: int) -> int:
    """Chunks of the longest caption that can be drawn for ``item``."""
    rules, captions = item.source.rules, item.source.captions
    texts = rules.longest(captions)
    chunks = max(own.chunks for text in texts for own in tokenize(base, plain(text), limit=limit))
    if not (rules.shuffle_tags or rules.tag_dropout or rules.wildcards):
        return chunks
    # Where the commas stand decides how full a chunk gets before the next begins. At worst one is left at a comma as far
    # back as that goes, and all but the last are.
    tokens = min(limit, max(token_count(base, text) for text in texts))
    if tokens <= WORDS_IN_CHUNK:
        return chunks
    least = WORDS_IN_CHUNK - COMMA_REACH + 1
    return max(chunks, 2 + (tokens - WORDS_IN_CHUNK - 1) // least)
