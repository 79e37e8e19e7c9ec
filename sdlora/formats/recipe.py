"""The recipe of an image as A1111, Forge and sdlora write it: prompts, LoRAs with their weights, parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .weight_curve import WeightCurve

TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>")
"""A tag in a prompt that loads a network: its kind, and its name with the weights."""
_MORE = ("lbw=", "start=", "stop=", "step=")
"""What ``--lora`` takes too, besides weights."""
_FIELD = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|\{[^{}]*\}|[^,]*)(?:,|$)')
"""``Key: value`` of the last line; a value with commas is quoted, except for the hashes."""
_NEGATIVE = "Negative prompt:"
_LEAST_FIELDS = 3
"""Fields of a last line that is one of parameters, at least: in A1111 too, a line with fewer belongs to the prompt."""


@dataclass(frozen=True, kw_only=True)
class LoraTag:
    """A LoRA that a prompt names, with the weights of its UNet part and of its text encoder part."""

    name: str
    unet: float
    text_encoder: float
    more: tuple[str, ...] = ()
    """What else is written: weights of blocks and over the steps, ``lbw=…``, ``start=…``, ``stop=…``, ``step=…``, and what
    nothing here follows, such as ``dyn=…``."""
    curve: WeightCurve | None = None
    """The UNet's weight where it changes with the steps; ``unet`` is its first weight then."""

    @classmethod
    def parse(cls, text: str) -> LoraTag:
        """Read ``name``, ``name:1``, ``name:TE:UNET`` or ``name:te=TE:unet=UNET``, as A1111 and Forge do.

        A single weight is that of both parts, ``te`` alone too; each may be a curve, ``0@0,1@0.5``.

        Raises:
            ValueError: there is no name, or a weight is not a finite number; the message says which.
        """
        name, *items = text.split(":")
        if not name.strip():
            raise ValueError("it names no LoRA")
        named = dict(item.split("=", 1) for item in items if "=" in item)
        positional = [item for item in items if "=" not in item]
        written = named.get("te", positional[0] if positional else "1")
        unet = named.get("unet", positional[1] if len(positional) > 1 else written)
        return cls(
            name=name,
            unet=_number(unet),
            text_encoder=_number(written),
            more=(*positional[2:], *(item for item in items if "=" in item and not item.startswith(("te=", "unet=")))),
            curve=WeightCurve.parse(unet) if "@" in unet else None,
        )

    @property
    def option(self) -> str:
        """What follows ``--lora``: the file with its weights, UNet first."""
        unet = f"{self.unet:.12g}" if self.curve is None else self.curve.text
        text_encoder = f"{self.text_encoder:.12g}"
        weights = [unet] if unet == text_encoder else [unet, text_encoder]
        more = [item for item in self.more if item.startswith(_MORE)]
        return ":".join([f"{self.name}.safetensors", *weights, *more])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an image was made with, as its parameters state it."""

    prompt: str
    """Without the tags of ``loras``."""
    negative: str
    loras: tuple[LoraTag, ...]
    fields: Mapping[str, str]
    """Key -> value of the last line, such as ``Sampler`` -> ``Euler a``; quotes around a value are removed."""
    problems: tuple[str, ...]
    """One line for each tag that cannot be read; it is left out of ``loras``."""


def parse_recipe(text: str) -> Recipe:
    """Read the ``parameters`` of an image. Any text is one: what has no form of its own belongs to the prompt."""
    prompt, negative, found = _parts(text)
    loras, problems = [], []
    for match in TAG.finditer(prompt):
        if match[1] == "hypernet":
            continue
        try:
            loras.append(LoraTag.parse(match[2]))
        except ValueError as error:
            problems.append(f"{match[0]}: {error}")
    return Recipe(
        prompt=re.sub(r" {2,}", " ", TAG.sub(lambda match: match[0] if match[1] == "hypernet" else "", prompt)).strip(),
        negative=negative,
        loras=tuple(loras),
        fields={key: _unquoted(value) for key, value in found},
        problems=tuple(problems),
    )


def tagged_prompt(text: str) -> str:
    """The prompt of an image's ``parameters`` as written, with its tags."""
    return _parts(text)[0].strip()


def _parts(text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """The prompt, the negative prompt, and the fields of the last line, quoted as they are."""
    *lines, last = text.strip().split("\n")
    found = _FIELD.findall(last)
    if len(found) < _LEAST_FIELDS:
        lines, found = [*lines, last], []
    start = next((number for number, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip()
    return prompt, negative, found


def _number(text: str) -> float:
    """A weight, or the first one of a curve."""
    if "@" in text:
        return WeightCurve.parse(text).weights[0]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a weight; expected a number")
    return value


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        text = json.loads(value)
    except ValueError:
        return value
    return text if isinstance(text, str) else value
