"""The text of captions: how the caption that is trained on is made from those that were found. Pure functions.

The order is: replacements, wildcards, the trigger, prefix and suffix, shuffled tags, dropped tags.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..randomness import Stream, generator

MAX_VARIANTS = 256
"""Largest number of a caption's wildcard variants that ``CaptionRules.longest`` lists."""
MAX_DEPTH = 20
"""Levels of nested wildcards; deeper ones are text."""


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """How the caption that is trained on is made from those that were found; the fields are those of ``[data]``."""

    trigger: str
    """Empty where the set has none."""
    trigger_as: Literal["word", "prefix", "template"] = "word"
    template: str = "{trigger}, {caption}"
    prefix: str = ""
    suffix: str = ""
    replace: tuple[tuple[str, str], ...] = ()
    wildcards: bool = False
    shuffle_tags: bool = False
    keep_tokens: int = 0
    tag_dropout: float = 0.0

    def caption(self, captions: Sequence[str], *, seed: int, epoch: int, image: int) -> str:
        """The variant with which ``image`` is shown in ``epoch``: a function of the arguments alone.

        One of ``captions`` is drawn, then the alternatives of its wildcards, the order of its tags, and which of them
        are dropped; the trigger and the first ``keep_tokens`` tags keep their place.
        """

        def rng(stream: Stream) -> np.random.Generator:
            return generator(seed, stream, epoch, image)

        text = (
            captions[int(rng(Stream.CAPTION_LINE).integers(len(captions)))] if len(captions) > 1 else "".join(captions)
        )
        parts = self._parts(text)
        if self.wildcards:
            drawn = rng(Stream.WILDCARD)
            parts = [draw_wildcards(part, lambda count: int(drawn.integers(count))) for part in parts]
        return self._arranged(self._worded(*parts), rng)

    def plain(self, captions: Sequence[str]) -> str:
        """Without randomness: the first caption, the first alternatives of its wildcards, every tag in its place."""
        parts = self._parts(captions[0] if captions else "")
        if self.wildcards:
            parts = [draw_wildcards(part, lambda _: 0) for part in parts]
        return self._arranged(self._worded(*parts), None)

    def longest(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Variants that include the one with the most tokens: every caption with every alternative of its wildcards.

        A caption with more than ``MAX_VARIANTS`` has only two: with the alternatives that have the most words, and the
        most letters.
        """
        found: dict[str, None] = {}
        for caption in captions or ("",):
            parts = self._parts(caption)
            for variant in wildcard_variants(parts) if self.wildcards else (parts,):
                found[self._arranged(self._worded(*variant), None)] = None
        return tuple(found)

    def _parts(self, text: str) -> list[str]:
        """Prefix, caption and suffix, all of which may contain wildcards."""
        for old, new in self.replace:
            text = text.replace(old, new)
        return [self.prefix, text, self.suffix]

    def _worded(self, prefix: str, text: str, suffix: str) -> str:
        """Prefix, caption and suffix on one line, with the trigger."""
        prefix, text, suffix = (" ".join(part.split()) for part in (prefix, text, suffix))
        if self.trigger and self.trigger_as == "word":
            if not (has_word(prefix, self.trigger) or has_word(suffix, self.trigger)):
                text = with_trigger(text, self.trigger)
        elif self.trigger and self.trigger_as == "prefix":
            text = with_trigger(without_word(text, self.trigger), self.trigger)
        elif self.trigger:
            filled = self.template.replace("{trigger}", self.trigger, 1).replace("{caption}", text, 1)
            text = filled if text else filled.strip(" ,")
        return _joined(_joined(prefix, text), suffix)

    def _arranged(self, text: str, rng: Callable[[Stream], np.random.Generator] | None) -> str:
        """``text`` with its tags shuffled and dropped; without ``rng``, only with the same spacing."""
        if not (self.shuffle_tags or self.tag_dropout):
            return text
        tags = split_tags(text)
        if rng is None:
            return ", ".join(tags)
        kept = self._kept(tags)
        free = [i for i in range(len(tags)) if i not in kept]
        order = [free[i] for i in rng(Stream.TAG_SHUFFLE).permutation(len(free))] if self.shuffle_tags else free
        dropped = rng(Stream.TAG_DROPOUT).random(len(tags)) < self.tag_dropout
        taken = iter(order)
        arranged = [i if i in kept else next(taken) for i in range(len(tags))]
        return ", ".join(tags[i] for i in arranged if i in kept or not dropped[i])

    def _kept(self, tags: Sequence[str]) -> set[int]:
        """Positions of the tags that are kept: the first ``keep_tokens``, and the first that contains the trigger."""
        kept = set(range(min(self.keep_tokens, len(tags))))
        if self.trigger:
            # A trigger may contain commas; then it is several tags in a row.
            trigger = split_tags(self.trigger)
            for first in range(len(tags)):
                if has_word(", ".join(tags[first : first + len(trigger)]), ", ".join(trigger)):
                    return kept | set(range(first, min(first + len(trigger), len(tags))))
        return kept


def has_word(caption: str, word: str) -> bool:
    """Whether ``caption`` contains ``word`` as a separate word: "art" is not in "party"."""
    return re.search(_word_pattern(word), caption, re.IGNORECASE) is not None


def with_trigger(caption: str, trigger: str) -> str:
    """``caption``, with ``trigger`` in front if it lacks it."""
    if has_word(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def without_word(caption: str, word: str) -> str:
    """``caption`` without every separate ``word``, and without the commas that this leaves over."""
    if not has_word(caption, word):
        return caption
    rest = re.sub(_word_pattern(word), "", caption, flags=re.IGNORECASE)
    rest = re.sub(r"\s*,(\s*,)+", ",", " ".join(rest.split()))
    return re.sub(r"\s+,", ",", rest).strip(" ,")


def _word_pattern(word: str) -> str:
    return rf"(?<!\w){re.escape(word)}(?!\w)"


def _joined(front: str, back: str) -> str:
    """Both with a space between, as kohya joins them, except before a comma."""
    between = " " if front and back and not back.startswith(",") else ""
    return front + between + back


def split_tags(caption: str) -> list[str]:
    """The tags of ``caption``, separated by commas, without surrounding white space and empty ones.

    A comma within brackets does not separate: ``(red hair, freckles:1.2)`` is one tag. A bracket that is escaped
    (``\\(``) or has no partner, as in the tag ``:(``, is not a bracket.
    """
    closing = _bracket_pairs(caption, "([", ")]")
    tags, start, position = [], 0, 0
    while position < len(caption):
        position = closing.get(position, position)
        if caption[position] == ",":
            tags.append(caption[start:position])
            start = position + 1
        position += 1
    tags.append(caption[start:])
    return [tag for tag in (tag.strip() for tag in tags) if tag]


def _bracket_pairs(text: str, opening: str, closing: str) -> dict[int, int]:
    """Position of each opening bracket that has a partner -> its partner's."""
    pairs: dict[int, int] = {}
    open_at: list[int] = []
    escaped = False
    for position, letter in enumerate(text):
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = True
        elif letter in opening:
            open_at.append(position)
        elif letter in closing:
            kind = opening[closing.index(letter)]
            # A bracket that was opened within and never closed is text.
            inner = next((i for i in reversed(range(len(open_at))) if text[open_at[i]] == kind), None)
            if inner is not None:
                pairs[open_at[inner]] = position
                del open_at[inner:]
    return pairs


Wildcards = tuple["str | tuple[Wildcards, ...]", ...]
"""A text in pieces: plain text, and the alternatives of each wildcard, which are pieces again."""


def draw_wildcards(text: str, choose: Callable[[int], int]) -> str:
    """``text`` with one alternative of each ``{a|b}``; ``choose(count)`` returns the index of the chosen one.

    Wildcards may be nested. Braces without a ``|`` between them, or without a partner, are text.
    """
    return _drawn(_pieces(text), choose)


def wildcard_variants(texts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Everything that ``draw_wildcards`` can return for ``texts`` together; the two longest if there are more than
    ``MAX_VARIANTS``."""
    pieces = [_pieces(text) for text in texts]
    variants = [found for found in map(_variants, pieces) if found is not None]
    if len(variants) == len(pieces) and math.prod(map(len, variants)) <= MAX_VARIANTS:
        return tuple(itertools.product(*variants))
    by_words = tuple(_widest(text, lambda variant: len(re.findall(r"\w+|[^\w\s]", variant))) for text in pieces)
    return tuple(dict.fromkeys((by_words, tuple(_widest(text, len) for text in pieces))))


def _pieces(text: str, depth: int = 0) -> Wildcards:
    pairs = _bracket_pairs(text, "{", "}") if depth < MAX_DEPTH else {}
    pieces: list[str | tuple[Wildcards, ...]] = []
    start = position = 0
    while position < len(text):
        if position in pairs and (bars := _bars(text, position, pairs)):
            edges = itertools.pairwise([position, *bars, pairs[position]])
            pieces += [text[start:position], tuple(_pieces(text[a + 1 : b], depth + 1) for a, b in edges)]
            position = pairs[position]
            start = position + 1
        position += 1
    return (*pieces, text[start:])


def _bars(text: str, opening: int, pairs: dict[int, int]) -> list[int]:
    """Positions of ``|`` between a brace and its partner, except those within nested braces."""
    bars, position = [], opening + 1
    while position < pairs[opening]:
        position = pairs.get(position, position)
        if text[position] == "|":
            bars.append(position)
        position += 1
    return bars


def _drawn(pieces: Wildcards, choose: Callable[[int], int]) -> str:
    return "".join(p if isinstance(p, str) else _drawn(p[choose(len(p))], choose) for p in pieces)


def _variants(pieces: Wildcards) -> tuple[str, ...] | None:
    """Every different text that ``pieces`` can become, in order; None where these are more than ``MAX_VARIANTS``."""
    made = ("",)
    for piece in pieces:
        endings = (piece,) if isinstance(piece, str) else _alternatives(piece)
        # A text has at least as many variants as any part of it.
        if endings is None:
            return None
        made = tuple(dict.fromkeys(map("".join, itertools.product(made, endings))))
        if len(made) > MAX_VARIANTS:
            return None
    return made


def _alternatives(wildcard: tuple[Wildcards, ...]) -> tuple[str, ...] | None:
    found: dict[str, None] = {}
    for variants in map(_variants, wildcard):
        found |= dict.fromkeys(variants or ())
        if variants is None or len(found) > MAX_VARIANTS:
            return None
    return tuple(found)


def _widest(pieces: Wildcards, width: Callable[[str], int]) -> str:
    return "".join(p if isinstance(p, str) else max((_widest(q, width) for q in p), key=width) for p in pieces)
