"""The sample sheet of a finished run, generated on the base that it was trained on."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import torch

from ..base.base import Base
from ..base.device_memory import cast
from ..base.load import decoding_dtype
from ..base.precision import choose_precision
from ..data.captions import with_trigger
from ..formats.thumbnail import add_thumbnail
from ..generation.grid import labelled_grid
from ..generation.request import ImageRequest
from ..generation.saving import save_png
from ..generation.studio import Studio
from ..progress import Progress
from .plan import RunPlan

CAPTIONS_SHOWN = 4


def write_samples(
    base: Base, plan: RunPlan, output: Path, *, progress: Progress, stop: threading.Event | None
) -> Path | None:
    """Write ``NAME.samples.png`` beside the trained file ``output``, and a thumbnail into it if configured.

    Each image is beneath its prompt, which is shortened if it is long.

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
    requests = [ImageRequest(prompt=prompt, seed=config.train.seed) for prompt in sample_prompts(plan)]
    if not requests:
        return None
    studio = Studio.on(_in_generating_precision(base, config.train.precision), [str(output)])
    images = studio.images(requests, progress=progress, stop=stop)
    sheet = labelled_grid([[image.image for image in images]], columns=[request.prompt for request in requests])
    file = sheet_file(output)
    save_png(sheet, file, "\n\n".join(image.parameters for image in images))
    if config.output.thumbnail and config.output.metadata == "full":
        add_thumbnail(output, images[0].image)
    return file


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


def sample_prompts(plan: RunPlan) -> list[str]:
    """``samples.prompts``, or the first training captions if it is not set; each with the trigger word."""
    prompts = plan.config.samples.prompts
    if prompts is None:
        sources = [item.source for item in plan.items if item.source.role == "train"]
        captions = dict.fromkeys(source.rules.plain(source.captions) for source in sources)
        prompts = tuple(captions)[:CAPTIONS_SHOWN]
    return [with_trigger(prompt, plan.config.trigger) for prompt in prompts]
