"""The configuration of the sample images that a run draws."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .setting import Section, Setting


class SamplesSection(Section):
    """The sample images: at the end of a run, and on the way if ``every`` or ``every_epochs`` is set."""

    prompts: Annotated[tuple[str, ...] | None, Setting(kohya="sample_prompts", affects="samples")] = None
    """Prompts of the sample sheet. By default the first four captions; [] draws none."""
    every: Annotated[int, Field(ge=0), Setting(kohya="sample_every_n_steps", affects="samples")] = 0
    """Steps between samples on the way, each a further row of the sheet; 0 draws none before the end."""
    every_epochs: Annotated[int, Field(ge=0), Setting(kohya="sample_every_n_epochs", affects="samples")] = 0
    """Epochs between samples on the way, as well as or instead of ``samples.every``; 0 draws none before the end."""
    at_first: Annotated[bool, Setting(kohya="sample_at_first", affects="samples")] = False
    """Whether the first row is drawn before the first step, with samples on the way: what the base makes of the prompts."""
    negative: Annotated[str, Setting(affects="samples")] = ""
    """Negative prompt of every sample."""
    seed: Annotated[int | None, Field(ge=0, lt=2**32), Setting(affects="samples")] = None
    """Seed of every sample. By default ``train.seed``."""
    steps: Annotated[int | None, Field(ge=1), Setting(affects="samples")] = None
    """Sampling steps. By default those of ``sdlora generate``."""
    guidance: Annotated[float | None, Field(ge=0, le=100), Setting(affects="samples")] = None
    """Classifier-free guidance scale. By default that of ``sdlora generate``."""
    size: Annotated[
        int | tuple[int, int] | None,
        Setting(affects="samples", values="pixels, or a list of width and height"),
    ] = None
    """Width and height of a sample in pixels. By default the base's own square."""
    sampler: Annotated[str | None, Setting(kohya="sample_sampler", affects="samples")] = None
    """Sampler, one of those of ``sdlora generate``. By default its own."""
    schedule: Annotated[str | None, Setting(affects="samples")] = None
    """Spread of the sampling steps, one of those of ``sdlora generate``, such as ``karras``. By default the sampler's."""
