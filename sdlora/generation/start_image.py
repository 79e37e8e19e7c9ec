"""Image to image and inpainting: the image that is drawn over, and the mask of what is repainted.

Importing this imports no package; numpy and Pillow are imported when an image is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..errors import SdloraError
from ..files import printable
from .numbers import is_number, is_whole

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..base.checkpoint import BaseCheckpoint

MOST_SIDES = 2
"""An image of more pixels than a square of this many times the base's side is drawn smaller, unless a size is stated."""
ImageArgument: TypeAlias = "str | Path | Image.Image"


@dataclass(frozen=True, kw_only=True, eq=False)
class StartImage:
    """An image that is drawn over. Two are equal only if they are the same object."""

    image: Image.Image
    """RGB, at its own size."""
    strength: float = 0.75
    """Share of the steps that are taken, above 0 and at most 1: how much of the image is repainted. A1111's default."""
    mask: Image.Image | None = None
    """In the shape of ``image``, at any size: white is repainted, black stays."""
    mask_blur: int = 4
    """Radius in pixels of the blur of the edge at which the old and the new pixels are mixed. A1111's default."""

    def steps_of(self, steps: int) -> int:
        """How many of ``steps`` are taken, as diffusers' pipelines count them."""
        return min(int(steps * self.strength), steps)

    def size_on(self, base: BaseCheckpoint) -> tuple[int, int]:
        """Width and height in pixels where none is stated: the image's own, rounded down to whole latents of ``base``.

        An image of more pixels than (2 x the base's side)² is scaled down to that area.
        """
        width, height = self.image.size
        factor, step = min(1.0, MOST_SIDES * base.resolution / math.sqrt(width * height)), base.latent_factor
        return max(step, int(width * factor) // step * step), max(step, int(height * factor) // step * step)

    def scaled(self, size: tuple[int, int]) -> Image.Image:
        """The image at ``size``, stretched where its aspect is another, as diffusers and A1111 ("Just resize") do."""
        from PIL import Image

        return self.image if self.image.size == size else self.image.resize(size, Image.Resampling.LANCZOS)

    def cells(self, size: tuple[int, int], factor: int) -> np.ndarray | None:
        """Which latents are repainted, float32 (height / factor, width / factor) of 0 and 1: those with a white pixel.

        White is a level from 128 on, as in diffusers.
        """
        if self.mask is None:
            return None
        import numpy as np
        from PIL import Image

        width, height = size
        white = np.asarray(self.mask.convert("L").resize(size, Image.Resampling.BILINEAR)) >= 128
        in_cells = white.reshape(height // factor, factor, width // factor, factor)
        return in_cells.max((1, 3)).astype(np.float32)

    def pasted(self, drawn: Image.Image) -> Image.Image:
        """``drawn`` where the mask is white, the image's own pixels elsewhere, mixed over the blurred edge."""
        if self.mask is None:
            return drawn
        from PIL import Image, ImageFilter

        mask = self.mask.convert("L").resize(drawn.size, Image.Resampling.BILINEAR)
        if self.mask_blur:
            mask = mask.filter(ImageFilter.GaussianBlur(self.mask_blur))
        return Image.composite(drawn, self.scaled(drawn.size), mask)

    @property
    def digest(self) -> str:
        """MD5 of the pixels, which A1111 calls the init image's hash."""
        import hashlib

        return hashlib.md5(self.image.tobytes(), usedforsecurity=False).hexdigest()


def start_image(
    image: ImageArgument | None, *, strength: float | None, mask: ImageArgument | None, mask_blur: int | None
) -> StartImage | None:
    """Read what a caller named: files, or images of Pillow; None where there is no image.

    Raises:
        SdloraError: with one line for each value that is out of range, or needs an image and there is none; and for a
            file that cannot be read, a mask of another shape, or one without white.
    """
    problems = []
    if image is None:
        for name, value in (("strength", strength), ("mask", mask), ("mask_blur", mask_blur)):
            if value is not None:
                problems.append(f"{name} {_shown(value)}: there is no image to draw over; name one with image")
    if mask is None and mask_blur is not None and image is not None:
        problems.append(f"mask_blur {mask_blur!r}: there is no mask; name one with mask")
    if strength is not None and (not is_number(strength) or not 0 < strength <= 1):
        problems.append(f"strength {strength!r}: expected a number above 0 and at most 1")
    if mask_blur is not None and (not is_whole(mask_blur) or not 0 <= mask_blur <= 256):
        problems.append(f"mask_blur {mask_blur!r}: expected pixels, a whole number from 0 to 256")
    opened: dict[str, Image.Image] = {}
    for name, source in (("image", image), ("mask", mask)):
        try:
            if source is not None:
                opened[name] = _opened(name, source)
        except SdloraError as error:
            problems += error.problems
    if image is not None and len(opened) == 2:
        problems += _mask_problems(opened["image"], opened["mask"], _shown(mask))
    if problems:
        raise SdloraError(problems)
    if image is None:
        return None
    return StartImage(
        image=opened["image"],
        strength=StartImage.strength if strength is None else strength,
        mask=opened.get("mask"),
        mask_blur=StartImage.mask_blur if mask_blur is None else mask_blur,
    )


def _opened(name: str, source: object) -> Image.Image:
    from PIL import Image

    from ..data.images import flattened, open_image

    ground = "#000000" if name == "mask" else "#ffffff"
    if isinstance(source, Image.Image):
        return flattened(source, ground)
    if isinstance(source, str | Path):
        return open_image(Path(source).expanduser(), ground)
    raise SdloraError(f"{name} is a {type(source).__name__}; expected the path of a file, or an image of Pillow")


def _mask_problems(image: Image.Image, mask: Image.Image, name: str) -> list[str]:
    """A mask may be smaller or larger than its image, but not of another shape."""
    import numpy as np

    (width, height), (across, down) = image.size, mask.size
    if abs(across * height - down * width) > max(width, height):
        return [f"mask {name}: {across} x {down} pixels for an image of {width} x {height}; expected the same shape"]
    if np.asarray(mask.convert("L")).max() < 128:
        return [f"mask {name}: nothing in it is white; paint white what is to be repainted"]
    return []


def _shown(value: object) -> str:
    if isinstance(value, str | Path):
        return printable(Path(value))
    return repr(value) if isinstance(value, int | float) else "an image"
