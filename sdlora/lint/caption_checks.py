"""What is wrong with captions and trigger words, or worth knowing of them: one small function for each kind of fault."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from ..data.caption_files import MAX_WORDS
from ..data.captions import has_word, split_tags
from ..data.findings import Finding, Severity
from ..data.folders import stem_of
from ..data.sources import Source
from ..families import WORDS_IN_CHUNK
from ..files import printable

COMMON_RANK = 40_000
"""A word among the first 40,000 of the 48,894 that CLIP's tokenizer learned stands for something already; "sks", which
people use for its rarity, is number 47,625."""
MANY_PIECES = 4
FUSED_FROM = 5
"""Captions that there must be before a tag in all of them says anything."""


class Vocabulary(Protocol):
    """The words of a text encoder."""

    def count(self, text: str) -> int:
        """Tokens of ``text``, marks not counted."""
        ...

    def pieces(self, text: str) -> tuple[str, ...]:
        """The tokens of ``text`` as they are read, the end of a word marked by a space."""
        ...

    def rank(self, word: str) -> int | None:
        """The number of ``word`` among the merges by which the vocabulary was learned, frequent ones first; None where it is
        not one token."""
        ...


def place_of(source: Source) -> str:
    """The file that holds its caption alone, else the image's own."""
    own = source.caption_file is not None and stem_of(source.caption_file.name) == stem_of(source.file.name)
    return printable(source.caption_file if own and source.caption_file else source.file)


def tag_counts(sources: Sequence[Source]) -> tuple[tuple[str, int], ...]:
    """How many training images have each tag, the trigger left out; frequent ones first."""
    counts: Counter[str] = Counter()
    for source in sources:
        if source.role == "train":
            counts.update({tag for text in source.captions for tag in _tags_but_trigger(source, text)})
    return tuple(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _tags_but_trigger(source: Source, text: str) -> list[str]:
    return [tag for tag in split_tags(text) if tag.lower() != source.rules.trigger.lower()]


def check_length(source: Source, vocabulary: Vocabulary, limit: int) -> Iterator[Finding]:
    """Whether all of a caption is read, and in how many pieces; more words than tokens are told of when it is listed."""
    if any(len(text.split()) > MAX_WORDS for text in source.captions):
        return
    tokens = max(map(vocabulary.count, source.rules.longest(source.captions)))
    if tokens > limit:
        yield _finding(
            source,
            "caption-overflow",
            "warning",
            f"{tokens} tokens, of which the last {tokens - limit} are not read (data.max_token_length is {limit})",
            "shorten it, what matters most in front" + (", or set data.max_token_length = 225" if limit < 225 else ""),
        )
    elif tokens > WORDS_IN_CHUNK:
        chunks = -(-tokens // WORDS_IN_CHUNK)
        yield _finding(
            source,
            "caption-long",
            "note",
            f"{tokens} tokens, read in {chunks} pieces of {WORDS_IN_CHUNK}",
            f"shorten it to {WORDS_IN_CHUNK} tokens if you want it read at once",
        )


def check_spelling(source: Source) -> Iterator[Finding]:
    """Brackets, braces, broken letters, underscores, tags told twice."""
    text = "\n".join(source.captions)
    if pair := _unbalanced(text):
        yield _finding(
            source,
            "caption-brackets",
            "warning",
            f"{pair} are not in pairs: {text.count(pair[0])} open, {text.count(pair[-1])} close",
            "close or remove them; a prompt with such a weight would be read otherwise than you mean",
        )
    if not source.rules.wildcards and (found := re.search(r"\{[^{}]*\|[^{}]*\}", text)):
        yield _finding(
            source,
            "caption-braces",
            "warning",
            f"{found[0]!r} is read as it stands",
            "set data.wildcards = true to draw one of its alternatives, or write one",
        )
    if found := re.search("\N{REPLACEMENT CHARACTER}|[ÃÂ][\u0080-\u00bf]|â€", text):
        yield _finding(
            source,
            "caption-garbled",
            "warning",
            f"letters that were decoded wrongly ({found[0]!r})",
            "write it again and save it as UTF-8",
        )
    trigger = source.rules.trigger
    if found := re.search(r"[^\W_]+(?:_[^\W_]+)+", text.replace(trigger, " ") if trigger else text):
        yield _finding(
            source,
            "caption-underscores",
            "note",
            f"underscores between words ({found[0]!r}), which take a token each",
            'write spaces, or set data.caption_replace = [["_", " "]]',
        )
    repeated = [
        tag
        for caption in source.captions
        for tag, times in Counter(tag.lower() for tag in split_tags(caption)).items()
        if times > 1
    ]
    if repeated:
        yield _finding(source, "caption-tag-twice", "note", f"the tag {repeated[0]!r} twice", "remove one of them")


def _unbalanced(text: str) -> str:
    """The first kind of bracket that does not pair up; those behind a backslash are text."""
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
    """How a caption of a training image has the trigger."""
    trigger = source.rules.trigger
    if not trigger or source.role != "train":
        return
    for caption in source.captions:
        if not has_word(caption, trigger):
            if trigger.lower() in caption.lower():
                yield _finding(
                    source,
                    "trigger-in-word",
                    "warning",
                    f"the trigger {trigger!r} only as a part of another word",
                    f"write {trigger!r} as a word of its own; it is put in front until then",
                )
            elif source.rules.trigger_as == "word":
                yield _finding(
                    source,
                    "trigger-absent",
                    "note",
                    f"without the trigger {trigger!r}, which is put in front",
                    "write it where it belongs if that is elsewhere, or use --fix",
                )
            return
        if trigger not in caption:
            yield _finding(
                source,
                "trigger-case",
                "note",
                f"the trigger {trigger!r} in other capitals, which CLIP reads as the same",
                "spell it alike everywhere, for programs that compare letters",
            )
            return


def check_trigger(trigger: str, place: str, vocabulary: Vocabulary) -> Iterator[Finding]:
    """Whether a text encoder has an idea of the trigger already, or spells it out in many tokens."""
    words = trigger.split()
    ranks = [vocabulary.rank(word) for word in words]
    if words and all(rank is not None and rank <= COMMON_RANK for rank in ranks):
        told = ", ".join(f"{word!r} is number {rank:,}" for word, rank in zip(words, ranks, strict=True))
        yield Finding(
            code="trigger-common",
            severity="warning",
            file=place,
            message=f"the trigger {trigger!r} means something already: {told} of the 48,894 words and syllables of CLIP",
            remedy="choose a word that does not exist, of two or three syllables",
        )
    pieces = vocabulary.pieces(trigger)
    if len(pieces) >= MANY_PIECES:
        yield Finding(
            code="trigger-many-tokens",
            severity="warning",
            file=place,
            message=f"the trigger {trigger!r} is {len(pieces)} tokens: {' + '.join(piece.strip() for piece in pieces)}",
            remedy="choose a shorter one, of two or three tokens",
        )


def check_repetition(sources: Sequence[Source], place: str) -> Iterator[Finding]:
    """Captions that several training images share, and tags that all of them have."""
    captioned = [source for source in sources if source.role == "train" and any(source.captions)]
    by_text: dict[str, list[Source]] = {}
    for source in captioned:
        by_text.setdefault(source.rules.plain(source.captions), []).append(source)
    if len(by_text) == 1 and len(captioned) > 1:
        text = next(iter(by_text))
        yield Finding(
            code="caption-all-same",
            severity="warning",
            file=place,
            message=f"all {len(captioned)} captions say {_short(text)!r}",
            remedy="write what each image shows, or all of it becomes part of the style",
        )
        return
    for text, group in by_text.items():
        if len(group) > 1:
            others = ", ".join(source.file.name for source in group[1:4]) + (", …" if len(group) > 4 else "")
            yield _finding(
                group[0],
                "caption-duplicate",
                "note",
                f"{_short(text)!r} is the caption of {len(group)} images: {group[0].file.name}, {others}",
                "tell them apart if they differ",
            )
    if len(captioned) >= FUSED_FROM:
        for tag, count in tag_counts(captioned):
            if count == len(captioned):
                yield Finding(
                    code="tag-in-every-caption",
                    severity="warning",
                    file=place,
                    message=f"the tag {_short(tag)!r} is in all {count} captions; it is learned as one with the trigger",
                    remedy="take it out if it belongs to the style, else show images without it"
                    if any(source.rules.trigger for source in captioned)
                    else "name it as the trigger if it is, take it out if it belongs to the style",
                )


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def _finding(source: Source, code: str, severity: Severity, message: str, remedy: str) -> Finding:
    return Finding(code=code, severity=severity, file=place_of(source), message=message, remedy=remedy)
