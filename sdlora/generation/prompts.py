"""A1111's prompt syntax: ``(up)``, ``(word:1.3)``, ``[down]``, ``\\(`` and ``\\{`` for brackets, ``BREAK`` for chunks."""

from __future__ import annotations

import re
from dataclasses import replace

from ..base.tokens import Span

BRACKET_FACTOR = 1.1
"""Round brackets multiply the weight by this, square brackets divide it."""
_TOKEN = re.compile(
    r"\\[\\()\[\]{}]"  # an escaped bracket or backslash
    r"|[(\[\]]"
    r"|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)"  # the weight that closes a bracket
    r"|\)"
    r"|\bBREAK\b"
    r"|[^\\()\[\]:B]+"
    r"|."
    r"|\n"
)


def parse_prompt(text: str) -> tuple[Span, ...]:
    """Split a prompt into spans of equal weight. Unclosed brackets weight the rest of the prompt, as in A1111.

    No text is an error.
    """
    spans: list[Span] = []
    round_open: list[int] = []
    square_open: list[int] = []

    def multiply(start: int, factor: float) -> None:
        spans[start:] = [replace(span, weight=span.weight * factor) for span in spans[start:]]

    for match in _TOKEN.finditer(text):
        token = match[0]
        if len(token) == 2 and token[0] == "\\":
            spans.append(Span(text=token[1]))
        elif token == "(":
            round_open.append(len(spans))
        elif token == "[":
            square_open.append(len(spans))
        elif token[0] == ":" and len(token) > 1 and round_open:
            multiply(round_open.pop(), float(token[1:-1]))
        elif token == ")" and round_open:
            multiply(round_open.pop(), BRACKET_FACTOR)
        elif token == "]" and square_open:
            multiply(square_open.pop(), 1 / BRACKET_FACTOR)
        elif token == "BREAK":
            spans.append(Span(text="", opens_chunk=True))
        else:
            spans.append(Span(text=token))
    for start in round_open:
        multiply(start, BRACKET_FACTOR)
    for start in square_open:
        multiply(start, 1 / BRACKET_FACTOR)
    return _joined(spans)


def _joined(spans: list[Span]) -> tuple[Span, ...]:
    """Join neighbours of equal weight that no BREAK separates."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and not span.opens_chunk and not last.opens_chunk and last.weight == span.weight:
            joined[-1] = Span(text=last.text + span.text, weight=span.weight)
        else:
            joined.append(span)
    return tuple(joined) or (Span(text=""),)
