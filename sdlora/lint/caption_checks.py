"""Checks of captions and trigger words: what is wrong with them, or worth knowing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from ..data.caption_files import MAX_WORDS
from ..data.captions import has_word, split_tags
from ..data.findings import Finding, findings_from
from ..data.folders import stem_of
from ..data.sources import Source
from ..families import WORDS_IN_CHUNK
from ..files import printable

COMMON_RANK = 40_000
"""The first 40,000 of the 48,894 words that CLIP's tokenizer learned mean something to it; "sks", which people use because
it is rare, is number 47,625."""
MANY_PIECES = 4
"""Tokens from which a trigger is reported as long."""
FUSED_FROM = 5
"""Captions that a set needs before a tag in all of them means anything."""


class Vocabulary(Protocol):
    """The words of a text encoder."""

    def count(self, text: str) -> int:
        """Number of tokens of ``text``, without the marks of its start and end."""
        ...

    def pieces(self, text: str) -> tuple[str, ...]:
        """The tokens of ``text`` as text; a space marks the end of a word."""
        ...

    def rank(self, word: str) -> int | None:
        """Position of ``word`` in the learned vocabulary, frequent words first; None where it is not one token."""
        ...


def place_of(source: Source) -> str:
    """The caption file, if it belongs to this image alone, otherwise the image file."""
    file = source.caption_file
    return printable(file if file and stem_of(file.name) == stem_of(source.file.name) else source.file)


def tag_counts(sources: Sequence[Source]) -> tuple[tuple[str, int], ...]:
    """Each tag except the trigger, and the number of training images that have it; frequent ones first."""
    counts: Counter[str] = Counter()
    for source in sources:
        if source.role == "train":
            counts.update({tag for text in source.captions for tag in _tags_but_trigger(source, text)})
    return tuple(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _tags_but_trigger(source: Source, text: str) -> list[str]:
    return [tag for tag in split_tags(text) if tag.lower() != source.rules.trigger.lower()]


def check_length(source: Source, vocabulary: Vocabulary, limit: int) -> Iterator[Finding]:
    """A finding where not all of a caption is read, or not at once.

    A caption with more words than tokens can be read is reported when it is listed.
    """
    if any(len(text.split()) > MAX_WORDS for text in source.captions):
        return iter(())
    tokens = max(map(vocabulary.count, source.rules.longest(source.captions)))
    chunks = -(-tokens // WORDS_IN_CHUNK)
    return findings_from(
        place_of(source),
        (
            "caption-overflow",
            "warning",
            tokens > limit
            and f"{tokens} tokens, of which the last {tokens - limit} are not read (data.max_token_length is {limit})",
            "shorten it, what matters most first" + (", or set data.max_token_length = 225" if limit < 225 else ""),
        ),
        (
            "caption-long",
            "note",
            WORDS_IN_CHUNK < tokens <= limit and f"{tokens} tokens, read in {chunks} pieces of {WORDS_IN_CHUNK}",
            f"shorten it to {WORDS_IN_CHUNK} tokens if you want it read at once",
        ),
    )


def check_spelling(source: Source) -> Iterator[Finding]:
    """Findings about brackets, braces, garbled letters, underscores and repeated tags."""
    text, trigger = "\n".join(source.captions), source.rules.trigger
    pair = _unbalanced(text)
    braces = not source.rules.wildcards and re.search(r"\{[^{}]*\|[^{}]*\}", text)
    garbled = re.search("\N{REPLACEMENT CHARACTER}|[ÃÂ][\u0080-\u00bf]|â€", text)
    underscores = re.search(r"[^\W_]+(?:_[^\W_]+)+", text.replace(trigger, " ") if trigger else text)
    repeated = [
        tag
        for caption in source.captions
        for tag, times in Counter(tag.lower() for tag in split_tags(caption)).items()
        if times > 1
    ]
    return findings_from(
        place_of(source),
        (
            "caption-brackets",
            "warning",
            pair and f"{pair} are not in pairs: {text.count(pair[0])} open, {text.count(pair[-1])} close",
            "close or remove them; A1111 and ComfyUI would read a prompt with them differently than you mean",
        ),
        (
            "caption-braces",
            "warning",
            braces and f"{braces[0]!r} is read literally",
            "set data.wildcards = true to draw one of its alternatives, or write one",
        ),
        (
            "caption-garbled",
            "warning",
            garbled and f"letters that were decoded with the wrong encoding ({garbled[0]!r})",
            "write it again and save it as UTF-8",
        ),
        (
            "caption-underscores",
            "note",
            underscores and f"underscores between words ({underscores[0]!r}), each of which takes a token",
            'write spaces, or set data.caption_replace = [["_", " "]]',
        ),
        ("caption-tag-twice", "note", repeated and f"the tag {repeated[0]!r} twice", "remove one of them"),
    )


def _unbalanced(text: str) -> str:
    """The first kind of bracket that does not pair up; brackets after a backslash are text."""
    bare = re.sub(r"\\.", "", text, flags=re.DOTALL)
    for pair in ("()", "[]"):
        depth = 0
        for character in bare:
            depth += (character == pair[0]) - (character == pair[1])
            if depth < 0:
                return pair
        if depth:
            return pair
    return ""


def check_trigger_in(source: Source) -> Iterator[Finding]:
    """A finding for the first caption of a training image that lacks the trigger or spells it differently."""
    trigger = source.rules.trigger
    if not trigger or source.role != "train":
        return iter(())
    caption = next((text for text in source.captions if not has_word(text, trigger) or trigger not in text), None)
    if caption is None:
        return iter(())
    absent = not has_word(caption, trigger)
    in_word = absent and trigger.lower() in caption.lower()
    return findings_from(
        place_of(source),
        (
            "trigger-in-word",
            "warning",
            in_word and f"the trigger {trigger!r} only as a part of another word",
            f"write {trigger!r} as a separate word; until then it is put in front",
        ),
        (
            "trigger-case",
            "note",
            not absent and f"the trigger {trigger!r} in other capitals, which CLIP reads as the same",
            "spell it the same everywhere, for programs that compare letters",
        ),
    )


def check_absent_triggers(sources: Sequence[Source], place: str) -> Iterator[Finding]:
    """One finding for each trigger that captions of training images in one set lack, with their number.

    Args:
        place: the folder of the set, for several captions; one alone is named by its own file.
    """
    lacking: dict[str, list[Source]] = {}
    for source in sources:
        if source.role == "train" and source.rules.trigger_as == "word" and _lacks_trigger(source):
            lacking.setdefault(source.rules.trigger, []).append(source)
    for trigger, group in lacking.items():
        several = len(group) > 1
        names = "" if not several or len(group) == len(sources) else f" ({_names(group)})"
        captions = f"{len(group)} captions lack" if several else "its caption lacks"
        yield from findings_from(
            place if several else place_of(group[0]),
            (
                "trigger-absent",
                "note",
                f"{captions} {trigger!r}{names}; it will be put in front",
                "write it where it belongs if that is elsewhere, or use --fix",
            ),
        )


def _lacks_trigger(source: Source) -> bool:
    """Whether a caption is without the trigger, in any capitals and even within another word."""
    trigger = source.rules.trigger
    return bool(trigger) and any(trigger.lower() not in text.lower() for text in source.captions)


def check_trigger(trigger: str, place: str, vocabulary: Vocabulary) -> Iterator[Finding]:
    """Findings for a trigger that means something to a text encoder already, or takes many tokens."""
    words, pieces = trigger.split(), vocabulary.pieces(trigger)
    ranks = [vocabulary.rank(word) for word in words]
    known = [f"{word!r} is number {rank:,}" for word, rank in zip(words, ranks, strict=True) if rank is not None]
    return findings_from(
        place,
        (
            "trigger-common",
            "warning",
            bool(words)
            and all(rank is not None and rank <= COMMON_RANK for rank in ranks)
            and f"the trigger {trigger!r} means something already: {', '.join(known)} of the 48,894 words and syllables "
            "of CLIP",
            "choose a word that does not exist, of two or three syllables",
        ),
        (
            "trigger-many-tokens",
            "warning",
            len(pieces) >= MANY_PIECES
            and f"the trigger {trigger!r} is {len(pieces)} tokens: {' + '.join(piece.strip() for piece in pieces)}",
            "choose a shorter one, of two or three tokens",
        ),
    )


def check_repetition(sources: Sequence[Source], place: str) -> Iterator[Finding]:
    """Findings about captions that several training images share, and tags that all of them have."""
    captioned = [source for source in sources if source.role == "train" and any(source.captions)]
    by_text: dict[str, list[Source]] = {}
    for source in captioned:
        by_text.setdefault(source.rules.plain(source.captions), []).append(source)
    if len(by_text) == 1 and len(captioned) > 1:
        message = f"all {len(captioned)} captions say {_short(next(iter(by_text)))!r}"
        remedy = "write what each image shows, or all of it becomes part of the style"
        yield from findings_from(place, ("caption-all-same", "warning", message, remedy))
        return
    for text, group in by_text.items():
        message = len(group) > 1 and f"{_short(text)!r} is the caption of {len(group)} images: {_names(group)}"
        remedy = "write what is different if they differ"
        yield from findings_from(place_of(group[0]), ("caption-duplicate", "note", message, remedy))
    if len(captioned) >= FUSED_FROM:
        yield from _fused_tags(captioned, place)


def _fused_tags(captioned: Sequence[Source], place: str) -> Iterator[Finding]:
    remedy = "name it as the trigger if it is, remove it if it belongs to the style"
    if any(source.rules.trigger for source in captioned):
        remedy = "remove it if it belongs to the style, otherwise add images without it"
    for tag, count in tag_counts(captioned):
        message = (
            count == len(captioned)
            and f"the tag {_short(tag)!r} is in all {count} captions; it is learned together with the trigger"
        )
        yield from findings_from(place, ("tag-in-every-caption", "warning", message, remedy))


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(source.file.name for source in sources[:4]) + (", …" if len(sources) > 4 else "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
