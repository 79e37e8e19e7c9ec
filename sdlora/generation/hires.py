"""A second pass at a higher resolution, which A1111 calls "Hires. fix". Importing this imports no package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SdloraError
from .numbers import count_problems, is_number

MAX_SCALE = 8


@dataclass(frozen=True, kw_only=True)
class Upscaler:
    """How what the first pass drew is enlarged."""

    name: str
    a1111_name: str
    mode: str
    """A mode of ``torch.nn.functional.interpolate`` for latents, one of ``PIL.Image.Resampling`` for pixels."""
    of_latents: bool = True
    """False: the latents are decoded, and the pixels are enlarged and encoded again."""
    antialias: bool = False


UPSCALERS: Mapping[str, Upscaler] = {
    upscaler.name: upscaler
    for upscaler in (
        Upscaler(name="latent", a1111_name="Latent", mode="bilinear"),
        Upscaler(name="latent-antialiased", a1111_name="Latent (antialiased)", mode="bilinear", antialias=True),
        Upscaler(name="latent-bicubic", a1111_name="Latent (bicubic)", mode="bicubic"),
        Upscaler(
            name="latent-bicubic-antialiased", a1111_name="Latent (bicubic antialiased)", mode="bicubic", antialias=True
        ),
        Upscaler(name="latent-nearest", a1111_name="Latent (nearest)", mode="nearest"),
        Upscaler(name="latent-nearest-exact", a1111_name="Latent (nearest-exact)", mode="nearest-exact"),
        Upscaler(name="lanczos", a1111_name="Lanczos", mode="LANCZOS", of_latents=False),
        Upscaler(name="nearest", a1111_name="Nearest", mode="NEAREST", of_latents=False),
    )
}
"""Name -> upscaler, as A1111 has them (modules/shared.py, latent_upscale_modes)."""
_BY_NAME = UPSCALERS | {upscaler.a1111_name.lower(): upscaler for upscaler in UPSCALERS.values()}


def find_upscaler(name: str) -> Upscaler | None:
    """The upscaler of this name, or of A1111's, in any case; None where there is none."""
    return _BY_NAME.get(name.lower())


@dataclass(frozen=True, kw_only=True)
class Hires:
    """The second pass. The defaults are A1111's."""

    scale: float = 2.0
    """Factor between the sides of the second pass and those of the first."""
    strength: float = 0.7
    """Above 0 and at most 1: how much of the enlarged image is repainted."""
    steps: int | None = None
    """Steps that are taken; None is the number of the first pass."""
    upscaler: str = "latent"
    """A name of ``UPSCALERS``."""

    def size(self, first: tuple[int, int], step: int) -> tuple[int, int]:
        """Width and height in pixels after ``first``, rounded down to multiples of ``step``."""
        return int(first[0] * self.scale) // step * step, int(first[1] * self.scale) // step * step

    def steps_taken(self, steps: int) -> int:
        """Steps that are taken after ``steps`` of the first pass."""
        return self.steps or steps

    def schedule_steps(self, steps: int) -> int:
        """Steps of the schedule whose last are taken, so many that their share is ``strength``; as A1111 counts them."""
        return int(self.steps_taken(steps) / min(self.strength, 0.999))


def hires_pass(scale: float | None, *, strength: float | None, steps: int | None, upscaler: str | None) -> Hires | None:
    """Read what a caller named; None where there is no second pass. Names of upscalers may be A1111's.

    Raises:
        SdloraError: with one line for each value that is out of range, or needs a second pass and there is none.
    """
    problems = []
    if scale is None:
        named = {"hires_strength": strength, "hires_steps": steps, "hires_upscaler": upscaler}
        stated = [f"{name} {value!r}" for name, value in named.items() if value is not None]
        problems += [f"{name}: there is no second pass; state its factor with hires, such as 2" for name in stated]
    elif not is_number(scale) or not 1 < scale <= MAX_SCALE:
        problems.append(f"hires {scale!r}: expected a factor above 1 and at most {MAX_SCALE}")
    if strength is not None and (not is_number(strength) or not 0 < strength <= 1):
        problems.append(f"hires_strength {strength!r}: expected a number above 0 and at most 1")
    if steps is not None:
        problems += count_problems(hires_steps=steps)
    chosen = find_upscaler(Hires.upscaler if upscaler is None else str(upscaler))
    if chosen is None:
        problems.append(f"hires_upscaler {upscaler!r} is unknown; choose one of {', '.join(UPSCALERS)}")
    if problems:
        raise SdloraError(problems)
    if scale is None or chosen is None:
        return None
    return Hires(
        scale=scale, strength=Hires.strength if strength is None else strength, steps=steps, upscaler=chosen.name
    )
