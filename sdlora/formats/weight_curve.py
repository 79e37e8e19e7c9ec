"""A weight that changes over the steps, in the notation of the extension sd-webui-loractl of A1111."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WeightCurve:
    """Weights at moments, with straight lines between them; before the first and after the last they stay the same."""

    points: tuple[tuple[float, float], ...]
    """(moment, weight), by rising moments: shares of all steps where none is above 1, otherwise numbers of steps from 0."""

    @classmethod
    def parse(cls, text: str) -> WeightCurve:
        """Read ``WEIGHT@MOMENT`` several times, separated by commas or semicolons; ``@1`` may be left out.

        Raises:
            ValueError: a part of another form, a negative moment, or one that is given twice; the message says which.
        """
        points = []
        for part in re.split("[,;]", text):
            weight, _, moment = part.partition("@")
            try:
                points.append((finite(moment or "1"), finite(weight)))
            except ValueError:
                raise ValueError(f"{part!r} is no weight at a step; expected such as 0@0,1@0.5,0@1") from None
        points.sort()
        moments = [moment for moment, _ in points]
        if moments[0] < 0 or len(set(moments)) < len(moments):
            raise ValueError(f"{text}: expected different steps, 0 or more, for the weights")
        return cls(points=tuple(points))

    def at(self, step: int, steps: int) -> float:
        """The weight in ``step``, counted from 0, of ``steps``; the share of the last step is 1."""
        last = self.points[-1][0]
        moment = step / max(1, steps - 1) if last <= 1 else float(step)
        (before, weight), *rest = self.points
        if moment <= before:
            return weight
        for after, following in rest:
            if moment <= after:
                return weight + (following - weight) * (moment - before) / (after - before)
            before, weight = after, following
        return weight

    def times(self, factor: float) -> WeightCurve:
        """The same curve at ``factor`` times its weights."""
        return WeightCurve(points=tuple((moment, factor * weight) for moment, weight in self.points))

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights at its moments."""
        return tuple(weight for _, weight in self.points)

    @property
    def text(self) -> str:
        """The curve as ``parse`` reads it."""
        return ",".join(f"{weight:.12g}@{moment:.12g}" for moment, weight in self.points)


def finite(text: str) -> float:
    """The number that ``text`` is. Raises ``ValueError`` where it is none, NaN or infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
