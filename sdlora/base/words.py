"""CLIP's tokenizer without a text encoder: enough to check captions, in a tenth of a second."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ..errors import BaseModelError

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
_MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP splits text into words (Radford et al. 2021, simple_tokenizer.py)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Words:
    """Counts and spells out the tokens of a text, by CLIP's tokenizer or a similar one; without start and end token."""

    tokenizer: Tokenizer

    def count(self, text: str) -> int:
        """Number of tokens of ``text``."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def pieces(self, text: str) -> tuple[str, ...]:
        """The tokens of ``text``, spelled out; a space marks the end of a word, and letters beyond ASCII are bytes."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False).tokens
        return tuple(token.replace(END_OF_WORD, " ") for token in tokens)

    def rank(self, word: str) -> int | None:
        """Position of ``word`` among the merges of the vocabulary, frequent ones first, single letters at 0.

        None if it is not a single token.
        """
        ids = self.tokenizer.encode(word, add_special_tokens=False).ids
        return max(0, ids[0] - 511) if len(ids) == 1 else None


@cache
def clip_words() -> Words:
    """CLIP's tokenizer with 49,408 tokens, which every published Stable Diffusion 1, 2 and XL uses."""
    merges = clip_merges()
    return Words(tokenizer=_tokenizer({token: index for index, token in enumerate(clip_vocabulary(merges))}, merges))


def words_in(folder: Path) -> Words:
    """The tokenizer in ``folder``, in the layout of diffusers.

    Raises:
        BaseModelError: it cannot be read.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return Words(tokenizer=tokenizer)
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        return Words(
            tokenizer=_tokenizer(vocabulary, [line for line in lines if line and not line.startswith("#version")])
        )
    # The tokenizers package raises plain exceptions.
    except Exception as error:
        raise BaseModelError(f"{folder}: cannot read the tokenizer ({error})") from None


def clip_merges() -> list[str]:
    """CLIP's 48,894 merges, pairs that became one token, in the order in which they were learned."""
    return gzip.decompress(_MERGES.read_bytes()).decode("utf-8").split("\n")[:-1]


def clip_vocabulary(merges: Sequence[str]) -> list[str]:
    """CLIP's tokens in the order of their ids."""
    letters = _byte_letters()
    words = [merge.replace(" ", "") for merge in merges]
    return [*letters, *(letter + END_OF_WORD for letter in letters), *words, START, END]


def _byte_letters() -> list[str]:
    """A letter for each byte, printable ones first: the alphabet of byte-level tokenizers (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(others)]


def _tokenizer(vocabulary: dict[str, int], merges: Sequence[str]) -> Tokenizer:
    pairs = [(first, second) for first, second in map(str.split, merges)]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=pairs, end_of_word_suffix=END_OF_WORD, unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer
