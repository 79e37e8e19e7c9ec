"""Alternatives in prompts, as sd-dynamic-prompts writes them: ``{a|b}``, ``{3::a|b}``, ``{2$$a|b|c}``.

An alternative may be empty, and may hold alternatives, weights of words, tags, wildcards and ``[a|b]``, whose ``|`` does not
separate. Braces without a ``|`` or ``$$`` between them are text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import SdloraError
from ..formats.recipe import TAG

_TOKEN = re.compile(r"\\.|[^\\{}|\[\]]+|.", re.DOTALL)
_COUNT = re.compile(r"\s*(\d{1,3})(?:-(\d{1,3}))?\$\$(?:([^$]*)\$\$)?")
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})::")
_JOINER = ", "
_MOST_LEVELS = 50
_BRACE = re.compile(rf"{TAG.pattern}|\\.|[{{}}]", re.DOTALL)


def drawn(text: str, draw: random.Random) -> str:
    r"""``text`` with one of the alternatives in place of each ``{a|b}``, from left to right, outer ones first.

    ``3::a`` is drawn three times as often as ``a``. ``{2$$a|b|c}`` draws two that differ, joined by a comma,
    ``{1-2$$a|b|c}`` one or two, and ``{2$$ and $$a|b|c}`` joins them by ``and``. ``\{`` and ``\}`` are text, and stay as
    they are.

    Raises:
        SdloraError: a brace without its partner, or more alternatives to be drawn than there are.
    """
    return _text(_parsed(text), draw) if "{" in text or "}" in text else text


def as_text(text: str) -> str:
    r"""``text`` of which ``drawn`` changes nothing: with ``\{`` for each brace outside of tags."""
    return _BRACE.sub(lambda match: rf"\{match[0]}" if match[0] in "{}" else match[0], text)


@dataclass(frozen=True)
class _Group:
    """The alternatives between two braces."""

    options: tuple[tuple[_Node, ...], ...]
    weights: tuple[float, ...]
    least: int
    most: int
    joiner: str
    several: bool

    def drawn(self, draw: random.Random) -> str:
        left, found = list(range(len(self.options))), list[str]()
        for _ in range(draw.randint(self.least, self.most) if self.least < self.most else self.least):
            (number,) = draw.choices(left, [self.weights[option] for option in left])
            left.remove(number)
            text = _text(self.options[number], draw)
            found.append(text.strip() if self.several else text)
        return self.joiner.join(found)


_Node = str | _Group


@dataclass
class _Bracket:
    """A bracket that is open while a prompt is read: what was read in it, between ``|``."""

    opening: str
    place: int
    segments: list[list[_Node]] = field(default_factory=lambda: [[]])

    def written(self) -> list[_Node]:
        """Everything from the opening bracket on, as text with the groups in it."""
        nodes: list[_Node] = [self.opening, *self.segments[0]]
        for segment in self.segments[1:]:
            nodes += ["|", *segment]
        return nodes


def _text(nodes: Sequence[_Node], draw: random.Random) -> str:
    return "".join(node if isinstance(node, str) else node.drawn(draw) for node in nodes)


def _parsed(text: str) -> list[_Node]:
    """Text and groups in their order. A square bracket without its partner is text, and its ``|`` those of the braces."""
    stack = [_Bracket("", 0)]
    for match in _TOKEN.finditer(text):
        token, top = match[0], stack[-1]
        if token in ("{", "["):
            stack.append(_Bracket(token, match.start()))
            if len(stack) > _MOST_LEVELS:
                raise SdloraError(f"prompt: {_near(text, match.start())}: brackets in more than {_MOST_LEVELS} levels")
        elif token == "|":
            top.segments.append([])
        elif token == "]" and top.opening == "[":
            stack.pop()
            stack[-1].segments[-1] += [*top.written(), "]"]
        elif token == "}":
            _close_square(stack)
            if not stack[-1].opening:
                raise SdloraError(rf"prompt: {_near(text, match.start())}: a }} without its {{; write \}} for a brace")
            closed = stack.pop()
            stack[-1].segments[-1] += _closed(closed, text[closed.place : match.end()])
        else:
            top.segments[-1].append(token)
    _close_square(stack)
    if stack[-1].opening:
        raise SdloraError(
            rf"prompt: {_near(text, stack[-1].place)}: a {{ without its }}; close it, or write \{{ for a brace"
        )
    return stack[0].written()


def _close_square(stack: list[_Bracket]) -> None:
    """Make text of the square brackets that are open within the innermost brace."""
    while stack[-1].opening == "[":
        bracket = stack.pop()
        stack[-1].segments[-1] += ["[", *bracket.segments[0]]
        stack[-1].segments += bracket.segments[1:]


def _closed(bracket: _Bracket, written: str) -> list[_Node]:
    """What a brace is, now that it is closed as ``written``."""
    count = _matched(_COUNT, bracket.segments[0])
    if len(bracket.segments) == 1 and count is None:
        return [*bracket.written(), "}"]
    weights = [_matched(_WEIGHT, segment) for segment in bracket.segments]
    least = most = 1
    if count is not None:
        least, most = int(count[1]), int(count[2] or count[1])
    shares = tuple(1.0 if weight is None else float(weight[1]) for weight in weights)
    able = sum(share > 0 for share in shares)
    if not least <= most <= able:
        number = f"{least}" if least == most else f"{least} to {most}"
        raise SdloraError(
            f"prompt: {_near(written, 0)}: draws {number} of {able} with a weight above 0; draw fewer, or write more"
        )
    return [
        _Group(
            options=tuple(map(tuple, bracket.segments)),
            weights=shares,
            least=least,
            most=most,
            joiner=_JOINER if count is None or count[3] is None else count[3],
            several=count is not None,
        )
    ]


def _matched(pattern: re.Pattern[str], segment: list[_Node]) -> re.Match[str] | None:
    """What ``pattern`` finds at the beginning of ``segment``, where it is taken away."""
    first = segment[0] if segment else None
    match = pattern.match(first) if isinstance(first, str) else None
    if match is not None:
        segment[0] = match.string[match.end() :]
    return match


def _near(text: str, place: int) -> str:
    """The text around ``place``, on one line."""
    return " ".join(text[max(0, place - 20) : place + 20].split())
