"""Which LoRA file, at which weights: of its parts, of the UNet's blocks, and over the steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import LoraFileError
from ..formats.tensor_files import PICKLES
from ..formats.weight_curve import WeightCurve, finite
from .blocks import BlockWeights, parse_blocks

MOST_WEIGHT = 10
_ENDINGS = "|".join(re.escape(ending) for ending in (".safetensors", *PICKLES))
_NAMED = "unet=, te=, lbw=, start=, stop= and step=START-STOP"


@dataclass(frozen=True, kw_only=True)
class LoraChoice:
    """A file with one weight for its UNet part and one for its text encoder part."""

    file: Path
    unet: float = 1.0
    text_encoder: float = 1.0
    blocks: BlockWeights | None = None
    """What the weights are multiplied by in each block."""
    start: int | float = 0
    """Steps before the LoRA changes the UNet: a whole number, or a float from 0 to 1, a share of all steps."""
    stop: int | float = 1.0
    """Steps after which it no longer does, likewise. Text encoders are changed throughout: a prompt is encoded once."""
    curve: WeightCurve | None = None
    """What the UNet's weight is multiplied by in each step."""

    @classmethod
    def parse(cls, text: str) -> LoraChoice:
        """Read ``FILE``, ``FILE:0.8`` or ``FILE:0.8:0.5``; a single number is the weight of both parts.

        A weight may be a curve, ``0@0,1@0.5``; text encoders have its first weight, since a prompt is encoded once.
        ``unet=``, ``te=``, ``lbw=``, ``start=``, ``stop=`` and ``step=START-STOP`` may follow, separated by colons.

        Raises:
            LoraFileError: a weight is not a number between -10 and 10, another value cannot be read, or no file is named.
        """
        match = re.fullmatch(rf"(.+?(?:{_ENDINGS}))((?::[^:]*)*)", text, re.DOTALL)
        if match is None and Path(text).is_dir():
            return cls(file=Path(text))
        items = match[2].split(":")[1:] if match else []
        positional = [item for item in items if "=" not in item]
        if match is None or len(positional) > 2:
            raise LoraFileError(
                f"{text}: expected FILE.safetensors (or .pt, .ckpt, .bin), FILE:WEIGHT or FILE:UNET:TE, or a PEFT folder"
            )
        named = dict(item.split("=", 1) for item in items if "=" in item)
        first = positional[0] if positional else named.get("te", "1")
        second = positional[1] if len(positional) > 1 else first
        choice = cls.weighted(
            Path(match[1]), unet=named.pop("unet", first), text_encoder=named.pop("te", second), source=text
        )
        return choice.with_options([f"{key}={value}" for key, value in named.items()], text)

    @classmethod
    def weighted(cls, file: Path, *, unet: str, text_encoder: str, source: str) -> LoraChoice:
        """``file`` at two weights, each a number or a curve; ``source`` is named in errors.

        Raises:
            LoraFileError: a weight that cannot be read or is out of range.
        """
        try:
            curve = WeightCurve.parse(unet) if "@" in unet else None
            first = WeightCurve.parse(text_encoder).weights[0] if "@" in text_encoder else _number(text_encoder)
            choice = cls(file=file, unet=1.0 if curve else _number(unet), text_encoder=first, curve=curve)
        except ValueError as error:
            raise LoraFileError(f"{source}: {error}") from None
        choice.check(source)
        return choice

    def with_options(self, items: Sequence[str], source: str) -> LoraChoice:
        """This choice with ``lbw=``, ``start=``, ``stop=`` and ``step=`` of ``items``; ``source`` is named in errors.

        Raises:
            LoraFileError: another item, or a value that cannot be read or is out of range.
        """
        choice = self
        for item in items:
            key, _, value = item.partition("=")
            if key == "lbw":
                choice = replace(choice, blocks=parse_blocks(value, source))
            elif key in ("start", "stop"):
                choice = replace(choice, **{key: _moment(value, source)})
            elif key == "step" and value.count("-") == 1:
                start, stop = value.split("-")
                choice = replace(choice, start=_moment(start, source), stop=_moment(stop, source))
            else:
                raise LoraFileError(f"{source}: {item!r} is unknown; expected weights, {_NAMED}")
        choice.check(source)
        return choice

    def check(self, source: str) -> None:
        """Raises ``LoraFileError``, which names ``source``, where a value is out of range."""
        curve = self.curve.times(self.unet).weights if self.curve else ()
        if not all(abs(weight) <= MOST_WEIGHT for weight in (self.unet, self.text_encoder, *curve)):
            raise LoraFileError(f"{source}: expected weights between -{MOST_WEIGHT} and {MOST_WEIGHT}")
        for moment in (self.start, self.stop):
            if moment < 0 or (isinstance(moment, float) and not moment <= 1):
                raise LoraFileError(f"{source}: start and stop are steps, such as 10, or shares from 0.0 to 1.0")
        if type(self.start) is type(self.stop) and self.start >= self.stop:
            raise LoraFileError(f"{source}: start {self.start} is not before stop {self.stop}")

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem

    @property
    def varies(self) -> bool:
        """Whether its weight in the UNet depends on the step."""
        return (self.start, self.stop) != (0, 1.0) or self.curve is not None

    def factor(self, step: int, steps: int) -> float:
        """What the UNet's weight is multiplied by in ``step``, counted from 0, of ``steps``."""
        first, end = (round(m * steps) if isinstance(m, float) else m for m in (self.start, self.stop))
        return float(first <= step < end) * (self.curve.at(step, steps) if self.curve else 1.0)

    def times(self, factor: float) -> LoraChoice:
        """The same file at ``factor`` times its weights."""
        return replace(self, unet=self.unet * factor, text_encoder=self.text_encoder * factor)

    @property
    def tag(self) -> str:
        """What follows the name in a tag: ``0.8``, ``te=0.5:unet=0.9``, and what else is set."""
        unet = f"{self.unet:g}" if self.curve is None else self.curve.times(self.unet).text
        same = self.curve is None and self.unet == self.text_encoder
        parts = [unet] if same else [f"te={self.text_encoder:g}", f"unet={unet}"]
        parts += [f"lbw={self.blocks.text}"] if self.blocks else []
        parts += [f"start={_written(self.start)}"] if self.start != 0 else []
        parts += [f"stop={_written(self.stop)}"] if self.stop != 1.0 or isinstance(self.stop, int) else []
        return ":".join(parts)


def _moment(text: str, source: str) -> int | float:
    """A step where ``text`` is a whole number, else a share of all steps."""
    try:
        return int(text) if re.fullmatch(r"\d+", text) else finite(text)
    except ValueError:
        raise LoraFileError(f"{source}: {text!r} is no step; expected a whole number, or a share such as 0.5") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("the weight after the colon is not a number") from None


def _written(moment: int | float) -> str:
    return f"{moment}" if isinstance(moment, int) else f"{moment:.6g}" if moment % 1 else f"{moment:.1f}"
