"""A1111's prompt syntax: ``(more)``, ``(word:1.3)``, ``[less]``, ``\\(`` for a bracket, ``BREAK`` for a new chunk."""

from __future__ import annotations

import re

from ..base.tokens import Span

STEP = 1.1
"""What a pair of round brackets multiplies by, and a pair of square ones divides by."""
_TOKEN = re.compile(
    r"\\[\\()\[\]]"  # an escaped bracket or backslash
    r"|[(\[\]]"
    r"|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)"  # the weight that closes a bracket
    r"|\)"
    r"|\bBREAK\b"
    r"|[^\\()\[\]:B]+"
    r"|."
    r"|\n"
)


def parse_prompt(text: str) -> tuple[Span, ...]:
    """Spans of one weight each. Brackets that never close weigh what is behind them, as in A1111; nothing is an error."""
    spans: list[Span] = []
    round_open: list[int] = []
    square_open: list[int] = []

    def multiply(start: int, factor: float) -> None:
        spans[start:] = [Span(text=s.text, weight=s.weight * factor, opens_chunk=s.opens_chunk) for s in spans[start:]]

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
            multiply(round_open.pop(), STEP)
        elif token == "]" and square_open:
            multiply(square_open.pop(), 1 / STEP)
        elif token == "BREAK":
            spans.append(Span(text="", opens_chunk=True))
        else:
            spans.append(Span(text=token))
    for start in round_open:
        multiply(start, STEP)
    for start in square_open:
        multiply(start, 1 / STEP)
    return _joined(spans)


def _joined(spans: list[Span]) -> tuple[Span, ...]:
    """Neighbours of one weight as one span, without the spaces about a BREAK."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and not span.opens_chunk and not last.opens_chunk and last.weight == span.weight:
            joined[-1] = Span(text=last.text + span.text, weight=span.weight)
        else:
            joined.append(span)
    return tuple(joined) or (Span(text=""),)
