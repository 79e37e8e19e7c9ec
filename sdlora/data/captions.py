"""Caption text: read from a file, with the trigger word in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

MAX_WORDS = 225
"""Three chunks of 75 tokens, the most that is read of a caption; a word is at least one."""


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """How the caption that is trained on is made from those that were found; the fields are those of ``[data]``."""

    trigger: str
    trigger_as: str = "word"
    template: str = "{trigger}, {caption}"
    prefix: str = ""
    suffix: str = ""
    replace: tuple[tuple[str, str], ...] = ()
    draw_lines: bool = False
    wildcards: bool = False
    shuffle_tags: bool = False
    keep_tokens: int = 0
    tag_dropout: float = 0.0


def read_caption(file: Path) -> str:
    """The caption in ``file``, on one line.

    Raises:
        DataError: unreadable, not UTF-8, empty, or longer than the text encoder can read.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); save it again as UTF-8") from None
    caption = " ".join(text.split())
    if not caption:
        raise DataError(f"{file}: empty; write what the picture shows")
    words = len(caption.split())
    if words > MAX_WORDS:
        raise DataError(f"{file}: {words} words; at most {MAX_WORDS} tokens are read, shorten it")
    return caption


def has_word(caption: str, word: str) -> bool:
    """Whether ``word`` stands in ``caption`` as a word of its own: "art" is not in "party"."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None


def with_trigger(caption: str, trigger: str) -> str:
    """``caption``, with ``trigger`` in front where it lacks it."""
    return caption if has_word(caption, trigger) else f"{trigger}, {caption}"
