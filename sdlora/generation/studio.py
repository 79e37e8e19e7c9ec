"""Drawing as functions: what ``sdlora generate`` calls, and what programs call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from ..base.checkpoint import find_base
from ..base.precision import choose_device, choose_precision
from ..config.sections import BaseSection
from ..errors import SdloraError
from ..progress import progress_bar
from .grid import labelled_grid
from .infotext import SAMPLERS
from .loras import FittedLora, LoraChoice, fit_loras

if TYPE_CHECKING:
    from ..base.base import Base
    from .pipeline import GeneratedImage, ImageRequest


def generate(
    prompts: str | Sequence[str],
    *,
    base: str | BaseSection = "mini",
    loras: Sequence[str | LoraChoice] = (),
    negative: str = "",
    seed: int = 0,
    count: int = 1,
    steps: int = 20,
    cfg: float = 5.0,
    size: tuple[int, int] | None = None,
    sampler: str = "dpm++2m",
    precision: str = "auto",
    show_progress: bool = True,
) -> list[GeneratedImage]:
    """Generate ``count`` images of each prompt, with seeds ``seed``, ``seed + 1`` …, under all ``loras`` at once.

    Args:
        prompts: in A1111's syntax, ``(word:1.2)``, ``[word]``, ``BREAK``; of any length.
        base: what ``base.path`` of a configuration names, or a whole ``[base]`` section of one.
        loras: ``FILE[:UNET[:TE]]`` or ``LoraChoice``.
        cfg: classifier-free guidance scale; 1 switches it off.
        size: (width, height) in pixels; by default the base's own square.

    Raises:
        SdloraError: a base, LoRA, size or sampler that cannot be used; nothing has been generated then.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    studio = Studio.open(base, loras, precision=precision)
    requests = [
        studio.request(text, negative=negative, seed=seed + i, steps=steps, cfg=cfg, size=size, sampler=sampler)
        for text in texts
        for i in range(count)
    ]
    from .pipeline import generate_images

    with progress_bar(show_progress) as progress:
        return generate_images(studio.base, requests, studio.pairs, progress)


def generate_strip(
    prompts: Sequence[str],
    *,
    base: str | BaseSection = "mini",
    loras: Sequence[str | LoraChoice],
    strengths: Sequence[float] = (0.0, 0.5, 1.0),
    scale: int = 1,
    precision: str = "auto",
    show_progress: bool = True,
    **options,
) -> tuple[Image.Image, str]:
    """A labelled image: a row for each prompt, a column for each strength of each LoRA, and a last one for all together.

    Strengths multiply the weights of ``loras``; strength 0 is shown once. Returns the image and its parameters.
    """
    studio = Studio.open(base, loras, precision=precision)
    requests = [studio.request(prompt, **options) for prompt in prompts]
    columns: list[tuple[str, list[tuple[FittedLora, LoraChoice]]]] = []
    if 0 in strengths:
        columns.append(("no LoRA", []))
    for fitted, choice in studio.pairs:
        weaker = [choice.times(strength) for strength in strengths if strength]
        columns += [(f"{scaled.name} {scaled.unet:g}", [(fitted, scaled)]) for scaled in weaker]
    if len(studio.pairs) > 1:
        columns.append(("both" if len(studio.pairs) == 2 else "all", studio.pairs))
    from .pipeline import generate_images

    images = []
    with progress_bar(show_progress) as progress:
        for _, pairs in columns:
            images.append(generate_images(studio.base, requests, pairs, progress))
    rows = [[column[row].image for column in images] for row in range(len(prompts))]
    sheet = labelled_grid(rows, columns=[label for label, _ in columns], scale=scale)
    return sheet, "\n\n".join(column[row].parameters for row in range(len(prompts)) for column in images)


@dataclass(frozen=True, kw_only=True, eq=False)
class Studio:
    """A loaded base with LoRAs that fit it."""

    base: Base
    pairs: list[tuple[FittedLora, LoraChoice]]

    @classmethod
    def open(cls, base: str | BaseSection, loras: Sequence[str | LoraChoice], *, precision: str) -> Studio:
        """Read ``loras`` and load ``base``; raises ``SdloraError`` where they do not fit, before anything is loaded."""
        checkpoint = find_base(base)
        choices = [LoraChoice.parse(lora) if isinstance(lora, str) else lora for lora in loras]
        fitted = fit_loras(checkpoint, [choice.file for choice in choices])
        # Imported here since it brings diffusers: what is wrong with the input is told before.
        from ..base.load import load_base

        device = choose_device()
        dtype = choose_precision(precision, device, unet_parameters=checkpoint.unet_parameters)
        loaded = load_base(checkpoint, device=device, dtype=dtype)
        return cls(base=loaded, pairs=[(fitted[choice.file], choice) for choice in choices])

    def request(
        self,
        prompt: str,
        *,
        negative: str = "",
        seed: int = 0,
        steps: int = 20,
        cfg: float = 5.0,
        size: tuple[int, int] | None = None,
        sampler: str = "dpm++2m",
    ) -> ImageRequest:
        """A request with the base's own size where none is given; raises ``SdloraError`` for what the base cannot do."""
        checkpoint = self.base.checkpoint
        width, height = size or (checkpoint.resolution, checkpoint.resolution)
        problems = []
        if width % checkpoint.size_step or height % checkpoint.size_step or min(width, height) <= 0:
            step = checkpoint.size_step
            problems.append(f"size {width}x{height}: sides of {checkpoint.name} are multiples of {step} pixels")
        if sampler not in SAMPLERS:
            problems.append(f"sampler {sampler!r} is not known; choose one of {', '.join(SAMPLERS)}")
        if steps < 1:
            problems.append(f"steps {steps}: at least 1 is needed")
        if problems:
            raise SdloraError(problems)
        from .pipeline import ImageRequest

        return ImageRequest(
            prompt=prompt,
            negative=negative,
            seed=seed,
            steps=steps,
            guidance=cfg,
            width=width,
            height=height,
            sampler=sampler,
        )
