"""Caption embeddings for the UNet: computed once for frozen text encoders, in each step for trained ones.

All captions are padded to the chunks of the longest, so embeddings do not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..base.base import Base
from ..base.conditioning import Conditioning
from ..base.device_memory import Room, move_to, working_on
from ..base.encode import encode_prompts
from ..base.fingerprints import text_fingerprint
from ..base.tokens import COMMA_REACH, PromptTokens, Tokens, padded, plain, token_count, tokenize
from ..cache.filling import Job, fill
from ..cache.keys import CacheKey, text_key
from ..cache.store import EncodedCache
from ..config.sections import Config
from ..data.examine import ExaminedImage
from ..families import TOKENS_IN_CHUNK, WORDS_IN_CHUNK
from ..progress import Progress, Silence

AHEAD_BYTES = 2**30
"""Bytes of embeddings that a run computes before its first step, at most; with more, each is computed when it is needed."""
KEPT_BYTES = 2**29
"""Bytes of embeddings computed in steps that are kept on the device, at most; those not used for longest are dropped."""
WRITTEN_BYTES = 2**30
"""Bytes of embeddings that a run writes to the disk: captions with random parts may never come again."""
KEPT_TOKENS = 8192
"""Number of captions whose tokens are kept."""
WAITING_WRITES = 64
"""Captions that wait for the disk, at most; what comes while so many wait is not written."""


class CaptionEmbeddings(Protocol):
    """Turns captions into what the UNet is conditioned on."""

    @property
    def chunks(self) -> int:
        """Number of 77-token chunks to which every caption is padded."""
        ...

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """One row for each caption: ``context`` (b, 77 · chunks, width) in the base's dtype, on its device.

        What lies in pinned memory is copied there without waiting.
        """
        ...

    def token_ids(self, captions: Sequence[str]) -> tuple[np.ndarray, ...]:
        """What ``encode_ids`` takes for each text encoder, (b, chunks, 77) int64; () where the text encoders are frozen."""
        ...

    def close(self) -> None:
        """Bring the disk cache under its cap if anything was written to it."""
        ...


def open_caption_embeddings(
    base: Base,
    items: Iterable[ExaminedImage],
    config: Config,
    cache: EncodedCache,
    *,
    room: Room | None = None,
    ahead: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> CaptionEmbeddings:
    """Embeddings for the captions of ``items``, frozen if the text encoders have learning rate 0.

    Frozen text encoders compute the captions ``ahead`` and leave the device, unless these are more than ``AHEAD_BYTES``.
    With None they compute each when it is needed. Without ``room`` the device is taken to have enough.
    """
    limit = config.data.max_token_length
    tokens = CaptionTokens(base, chunks=chunks_of(base, items, limit), limit=limit)
    if config.optimizer.text_encoder_rate(base.checkpoint.family):
        move_to(base.device, *base.encoder_models())
        return TrainedEmbeddings(base, tokens)
    fingerprint = text_fingerprint(base) if config.cache.disk else ""
    embeddings = FrozenEmbeddings(
        base, tokens, cache, encoders=fingerprint, room=room or Room(base.device), threaded=ahead is not None
    )
    if ahead is None or not embeddings.encode_ahead(ahead, progress or Silence()):
        move_to(base.device, *base.encoder_models())
    return embeddings


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

    def __init__(
        self, base: Base, tokens: CaptionTokens, cache: EncodedCache, *, encoders: str, room: Room, threaded: bool
    ):
        """``encoders`` is the fingerprint of the text encoders; "" if the cache keeps nothing.

        ``room`` is for embeddings. ``threaded``: whether a thread writes to the cache what a step had to compute.
        """
        self._base, self._tokens, self._cache, self._encoders = base, tokens, cache, encoders
        self._room, self._ahead = room, dict[str, Conditioning]()
        self._writer = ThreadPoolExecutor(1, "sdlora-write") if threaded else None
        self._writes: list[Future[None]] = []
        self._bytes_to_write = WRITTEN_BYTES
        width = base.unet.config["cross_attention_dim"]
        self._bytes_per_caption = tokens.chunks * TOKENS_IN_CHUNK * width * base.dtype.itemsize
        kept = int(min(KEPT_BYTES, room.left)) // self._bytes_per_caption
        self._row = lru_cache(maxsize=max(64, kept))(self._look_up_or_encode)

    @property
    def chunks(self) -> int:
        return self._tokens.chunks

    def encode_ahead(self, captions: Iterable[str], progress: Progress) -> bool:
        """Look up or encode ``captions`` now; False, without doing so, if they are more than ``AHEAD_BYTES``.

        The text encoders are on the device meanwhile.
        """
        different: dict[str, None] = {}
        for caption in captions:
            different[caption] = None
            if len(different) * self._bytes_per_caption > AHEAD_BYTES:
                return False
        jobs = [
            Job(key=self._key(tokens), load=lambda tokens=tokens: tokens) for tokens in map(self._tokens.of, different)
        ]
        with working_on(self._base.device, *self._base.encoder_models()):
            rows = fill(self._cache, jobs, self._encode, progress=progress, task="Encoding captions")
            for caption, row in zip(different, rows, strict=True):
                names = sorted(row)
                kept = dict(zip(names, self._room.keep([row[name] for name in names]), strict=True))
                self._ahead[caption] = Conditioning(context=kept["context"], pooled=kept.get("pooled"))
        return True

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """As in ``CaptionEmbeddings``, without gradients."""
        rows = [self._ahead.get(caption) or self._row(caption) for caption in captions]
        return Conditioning.stack([row.to(self._base.device) for row in rows])

    def token_ids(self, captions: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Nothing: a caption is encoded once."""
        return ()

    def close(self) -> None:
        """Bring the disk cache under its cap if anything was written to it."""
        if self._writer is not None:
            self._writer.shutdown()
        self._cache.close()

    @torch.no_grad()
    def _encode(self, tokens: PromptTokens) -> dict[str, Tensor]:
        """One row. Captions are encoded one by one, so rounding does not depend on the rest of a batch."""
        row = encode_prompts(self._base, [tokens])
        return {"context": row.context} | ({} if row.pooled is None else {"pooled": row.pooled})

    def _look_up_or_encode(self, caption: str) -> Conditioning:
        tokens = self._tokens.of(caption)
        key = self._key(tokens)
        row = self._cache.get(key)
        if row is None:
            with working_on(self._base.device, *self._base.encoder_models()):
                row = self._encode(tokens)
            self._bytes_to_write -= row["context"].nbytes
            if self._bytes_to_write >= 0:
                self._write(key, row)
        return Conditioning(context=row["context"], pooled=row.get("pooled")).to(self._base.device)

    def _write(self, key: CacheKey, row: Mapping[str, Tensor]) -> None:
        """Put ``row`` into the cache: now, or in the thread, which waits for the device in place of the step."""
        if self._writer is None:
            self._cache.put(key, row)
            return
        self._writes = [write for write in self._writes if not write.done()]
        if len(self._writes) < WAITING_WRITES:
            on_cuda = self._base.device.type == "cuda"
            computed = torch.cuda.current_stream(self._base.device).record_event() if on_cuda else None
            self._writes.append(self._writer.submit(self._put, key, row, computed))

    def _put(self, key: CacheKey, row: Mapping[str, Tensor], computed: torch.cuda.Event | None) -> None:
        if computed is not None:
            computed.synchronize()
        self._cache.put(key, row)

    def _key(self, tokens: PromptTokens) -> CacheKey:
        return text_key(
            ids=[encoder.ids for encoder in tokens],
            weights=[encoder.weights for encoder in tokens],
            encoders=self._encoders,
            dtype=self._base.dtype,
            device=self._base.device,
        )


def chunks_of(base: Base, items: Iterable[ExaminedImage], limit: int) -> int:
    """Number of chunks to which all captions of ``items`` are padded: ``most_chunks`` of the longest."""
    return max([1, *(most_chunks(base, item, limit) for item in items)])


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
