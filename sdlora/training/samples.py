"""What the samples of a run are, and the sheet of a finished run, generated on the base that it was trained on."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ..base.base import Base
from ..base.device_memory import cast
from ..base.load import decoding_dtype
from ..base.precision import choose_precision
from ..data.captions import with_trigger
from ..errors import ConfigError, SdloraError
from ..files import write_png
from ..formats.thumbnail import add_thumbnail
from ..generation.alternatives import as_text
from ..generation.grid import labelled_grid
from ..generation.request import ImageRequest, check_requests
from ..generation.samplers import read_sampler
from ..generation.studio import Studio
from ..generation.wildcards import choose_texts
from ..progress import Progress
from .moments import Moments
from .plan import RunPlan
from .sample_cells import SampleCells, stated

CAPTIONS_SHOWN = 4
LARGEST_SHEET = 24_000_000
"""Pixels of all images of a sheet with several rows, about and at most: 23 images of SDXL in full size."""
REQUESTS_KEY = "sdlora_samples"
"""Key of the text in a sheet that says what its columns were drawn from."""


def write_samples(
    base: Base, plan: RunPlan, output: Path, *, progress: Progress, stop: threading.Event | None
) -> Path | None:
    """Write ``NAME.samples.png`` beside the trained file ``output``, and a thumbnail into it if configured.

    Each image is beneath its prompt, which is shortened if it is long; above it are those of the steps on the way.

    The LoRA is read from ``output`` and merged into ``base``, so the images show what the file does. They are made in
    ``train.precision`` if it is set, else in that of ``sdlora.generate``, and equal its images of the same base, LoRA, seed
    and precision, except where a GPU trained in bfloat16. There the base, rounded to bfloat16 already, is cast to float16,
    which keeps more bits of a LoRA that is merged into it. ``base`` is not to be used afterwards.

    Returns the sheet's path, or None without sample prompts.

    Raises:
        BaseModelError: the UNet or the VAE produced NaN or Inf.
        Interrupted: ``stop`` was set; ``output`` is complete.
    """
    config = plan.config
    requests = sample_requests(plan)
    if not requests:
        return None
    studio = Studio.on(_in_generating_precision(base, config.train.precision), [str(output)])
    images = studio.images(requests, progress=progress, stop=stop)
    earlier = sample_cells(plan).rows() if sample_moments(plan) else {}
    sheet = sample_sheet(plan, earlier, [image.image for image in images])
    file = sheet_file(output)
    recipes = "\n\n".join(image.parameters for image in images)
    write_png(file, sheet, [("parameters", recipes), (REQUESTS_KEY, stated(requests))])
    if config.output.thumbnail and config.output.metadata == "full":
        add_thumbnail(output, images[0].image)
    return file


def sample_sheet(
    plan: RunPlan, earlier: Mapping[int, Sequence[Image.Image]], final: Sequence[Image.Image] = ()
) -> Image.Image:
    """The sheet with a row for each step of ``earlier``, and a last one of the ``final`` images, those of the file.

    Images of a sheet with several rows are reduced where it would be larger than ``LARGEST_SHEET``.
    """
    rows = [*earlier.values(), *([final] if final else [])]
    labels = [f"step {step}" for step in earlier] + (["LoRA file"] if final else [])
    shown = [[reduced(image, images=len(rows) * len(row)) for image in row] for row in rows] if earlier else rows
    columns = [request.prompt for request in sample_requests(plan)]
    return labelled_grid(shown, columns=columns, row_labels=labels if earlier else ())


def reduced(image: Image.Image, *, images: int) -> Image.Image:
    """``image`` at the size at which so many of it are at most about ``LARGEST_SHEET`` pixels; never enlarged."""
    factor = math.sqrt(LARGEST_SHEET / (images * image.width * image.height))
    if factor >= 1:
        return image
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))


def sample_cells(plan: RunPlan) -> SampleCells:
    """Where the images of the rows on the way are."""
    return SampleCells(Path(plan.config.output.path), plan.identity, sample_requests(plan))


def sample_moments(plan: RunPlan) -> Moments:
    """The steps after which a row is drawn."""
    section = plan.config.samples
    return Moments(
        steps=section.every,
        epochs=section.every_epochs,
        batches_per_epoch=plan.batches.batches_per_epoch,
    )


def _in_generating_precision(base: Base, requested: str) -> Base:
    """``base`` with its models cast, one tensor after another; with a quantised UNet it stays as it is."""
    parameters = base.checkpoint.unet_parameters
    dtype = choose_precision(requested, base.device, unet_parameters=parameters, generating=True)
    quantized = any(buffer.dtype in (torch.int8, torch.uint8) for buffer in base.unet.buffers())
    if dtype == base.dtype or quantized:
        return base
    cast(dtype, base.unet, *base.encoder_models())
    cast(decoding_dtype(dtype, base.device), base.vae)
    return replace(base, dtype=dtype)


def sheet_file(output: Path) -> Path:
    """Where the sample sheet of the trained file ``output`` is."""
    return output.with_suffix(".samples.png")


def sample_requests(plan: RunPlan) -> list[ImageRequest]:
    """The request of each column of the sheet, in which alternatives were drawn as ``generate`` does.

    Raises:
        SdloraError: alternatives that cannot be read.
    """
    section, size = plan.config.samples, plan.config.samples.size
    sampler, schedule = read_sampler(section.sampler or ImageRequest.sampler, section.schedule)
    request = ImageRequest(
        prompt="",
        negative=section.negative,
        seed=plan.config.train.seed if section.seed is None else section.seed,
        steps=section.steps or ImageRequest.steps,
        cfg=ImageRequest.cfg if section.guidance is None else section.guidance,
        size=(size, size) if isinstance(size, int) else size,
        sampler=sampler,
        schedule=schedule,
    )
    return choose_texts([replace(request, prompt=prompt) for prompt in sample_prompts(plan)])


def check_samples(plan: RunPlan) -> None:
    """Find out before a model is loaded whether the samples can be drawn.

    Raises:
        ConfigError: with one line for each setting of ``[samples]`` that does not work on the base.
    """
    try:
        check_requests(sample_requests(plan), plan.base)
    except SdloraError as error:
        raise ConfigError([f"samples.{problem}" for problem in error.problems]) from None


def sample_prompts(plan: RunPlan) -> list[str]:
    """``samples.prompts``, or the first training captions, as text, if it is not set; each with the trigger word."""
    prompts = plan.config.samples.prompts
    if prompts is None:
        return [as_text(caption) for caption in training_captions(plan)[:CAPTIONS_SHOWN]]
    return [with_trigger(prompt, plan.config.trigger) for prompt in prompts]


def training_captions(plan: RunPlan) -> list[str]:
    """The different captions that are trained, in order of the images, with the trigger word."""
    sources = [item.source for item in plan.items if item.source.role == "train"]
    captions = dict.fromkeys(source.rules.plain(source.captions) for source in sources)
    return [with_trigger(caption, plan.config.trigger) for caption in captions]
