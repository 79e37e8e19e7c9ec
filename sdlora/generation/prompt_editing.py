"""Prompts that change over the steps, and prompts of several parts, as A1111 writes them.

``[from:to:when]``, ``[to:when]`` and ``[from::when]`` edit a prompt during sampling, ``[a|b]`` alternates, and ``AND`` joins
parts whose predictions are combined (Liu et al. 2022). The grammar is A1111's, of version 1.6 and newer
(``modules/prompt_parser.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_TOKEN = re.compile(r"\\.|[^\\()\[\]:|]+|.", re.DOTALL)
_WHEN = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*")
_AND = re.compile(r"\bAND\b")
_PART = re.compile(r"(.*?)(?:\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+)))?\s*", re.DOTALL)
_CLOSES = {")": "(", "]": "["}
_MOST_COLONS = 2


@dataclass(frozen=True, kw_only=True)
class PromptPart:
    """One of the prompts that AND joins."""

    text: str
    weight: float = 1.0


def prompt_parts(prompt: str) -> tuple[PromptPart, ...]:
    """The parts of ``a cat :1.2 AND a dog``. Without AND there is one, and a number at its end is part of its text."""
    texts = _AND.split(prompt)
    if len(texts) == 1:
        return (PromptPart(text=prompt),)
    matches = [_PART.fullmatch(text) for text in texts]
    return tuple(PromptPart(text=match[1], weight=float(match[2] or 1)) for match in matches if match)


def texts_over_steps(prompt: str, steps: int, second_pass: int = 0) -> tuple[str, ...]:
    """The text of ``prompt`` in each of ``steps`` steps, then in those of a second pass. The syntax of weights stays in it.

    ``when`` with a decimal point is a share of the steps, without one a number of steps; it is rounded down. After so many
    steps the second text takes the place of the first. Both go on counting in the second pass, whose middle is ``1.5``. What
    is not well formed is text.
    """
    nodes = _parse(prompt)
    if all(isinstance(node, str) for node in nodes):
        return (prompt,) * (steps + second_pass)
    moments = [_Moment(step, steps) for step in range(1, steps + 1)]
    moments += [_Moment(step, second_pass, steps) for step in range(1, second_pass + 1)]
    return tuple(_text(nodes, moment) for moment in moments)


def text_outside(prompt: str) -> str:
    """What of ``prompt`` is neither edited nor alternates: text, and brackets that are not well formed."""
    return "".join(node if isinstance(node, str) else " " for node in _parse(prompt))


@dataclass(frozen=True)
class _Moment:
    step: int
    """From 1."""
    steps: int
    """Number of steps of this pass."""
    before: int = 0
    """Number of steps of the pass before; 0 in the first."""

    def is_after(self, when: str) -> bool:
        value = float(when)
        switch = (value - (self.before > 0)) * self.steps if "." in when else value - self.before
        # Rounded down only after it is limited: no number that can be written is too large.
        return self.step > int(max(0, min(self.steps, switch)))


@dataclass(frozen=True)
class _Edit:
    first: tuple[_Node, ...]
    then: tuple[_Node, ...]
    when: str

    def at(self, moment: _Moment) -> tuple[_Node, ...]:
        return self.then if moment.is_after(self.when) else self.first


@dataclass(frozen=True)
class _Alternation:
    options: tuple[tuple[_Node, ...], ...]

    def at(self, moment: _Moment) -> tuple[_Node, ...]:
        return self.options[(moment.step - 1) % len(self.options)]


_Node = str | _Edit | _Alternation


@dataclass
class _Bracket:
    """A bracket that is open while a prompt is read: what was read in it, between separators."""

    opening: str
    segments: list[list[_Node]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def written(self) -> list[_Node]:
        """Everything from the opening bracket on, as text with whatever is well formed in it."""
        nodes: list[_Node] = [self.opening, *self.segments[0]]
        for separator, segment in zip(self.separators, self.segments[1:], strict=True):
            nodes += [separator, *segment]
        return nodes

    def closed(self, closing: str) -> list[_Node] | None:
        """What the bracket is, now that it is closed; None if it is not well formed."""
        if not self.separators or (self.opening == "(" and self.separators == [":"]):
            return [*self.written(), closing]
        if self.opening == "(":
            return None
        parts = [tuple(segment) for segment in self.segments]
        if set(self.separators) == {"|"}:
            return [_Alternation(tuple(parts))]
        when = _WHEN.fullmatch("".join(map(str, parts[-1]))) if all(isinstance(x, str) for x in parts[-1]) else None
        if when is None or set(self.separators) != {":"} or len(self.separators) > _MOST_COLONS:
            return None
        first, then = ((), parts[0]) if len(self.separators) == 1 else (parts[0], parts[1])
        return [_Edit(first, then, when[1])]


def _parse(prompt: str) -> list[_Node]:
    """Text, edits and alternations in their order.

    A bracket that is not well formed is text, and so are those around it, since nothing in a well-formed one is malformed.
    """
    if "[" not in prompt:
        return [prompt]
    root: list[_Node] = []
    stack: list[_Bracket] = []

    def give_up(rest: Sequence[_Node]) -> None:
        for bracket in stack:
            root.extend(bracket.written())
        root.extend(rest)
        stack.clear()

    for token in _TOKEN.findall(prompt):
        if token in "([":
            stack.append(_Bracket(token))
        elif not stack:
            root.append(token)
        elif token in _CLOSES:
            found = stack[-1].closed(token) if stack[-1].opening == _CLOSES[token] else None
            if found is None:
                give_up([token])
            else:
                stack.pop()
                (stack[-1].segments[-1] if stack else root).extend(found)
        elif token in ":|":
            stack[-1].separators.append(token)
            stack[-1].segments.append([])
        else:
            stack[-1].segments[-1].append(token)
    give_up([])
    return root


def _text(nodes: Sequence[_Node], moment: _Moment) -> str:
    """``nodes`` at ``moment``; without recursion, since brackets may be nested to any depth."""
    found: list[str] = []
    rest = list(reversed(nodes))
    while rest:
        node = rest.pop()
        if isinstance(node, str):
            found.append(node)
        else:
            rest.extend(reversed(node.at(moment)))
    return "".join(found)
