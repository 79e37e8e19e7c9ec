"""A loaded base that images are generated on, call after call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from PIL import Image

from ..base.checkpoint import BaseCheckpoint, find_base
from ..base.device import device_facts
from ..base.gpu_build import why_not_cuda
from ..base.precision import choose_device, describe_precision, explain_precision
from ..config.sections import BaseSection
from ..errors import SdloraError
from ..lora.stack import Stack
from ..progress import Progress, progress_or_bar
from .arguments import (
    DrawingOptions,
    LoraArgument,
    PromptArgument,
    SamplingOptions,
    base_argument,
    image_requests,
    lora_choices,
)
from .grid import labelled_grid
from .loras import FittedLora, WeightedLora, fit_loras
from .numbers import check_counts
from .prompt_folders import PromptFolders
from .prompt_syntax import check_syntax
from .request import ImageRequest, check_requests
from .strip import STRENGTHS, check_columns, strip_columns
from .tags import check_named_once, without_effect
from .wildcards import choose_texts

if TYPE_CHECKING:
    from ..base.base import Base
    from .images import GeneratedImage

logger = logging.getLogger(__name__)


def open(
    base: str | Path | BaseSection = "mini",
    *,
    precision: str = "auto",
    vae_tiling: bool = False,
    batch_size: int | None = None,
    lora_dir: str | Path | None = None,
    wildcards: str | Path | None = None,
) -> OpenStudio:
    """A base that stays loaded between calls. Its weights are read when the first image is generated.

    ``base``, ``precision``, ``vae_tiling``, ``batch_size``, ``lora_dir`` and ``wildcards`` are as in ``generate``.

    Raises:
        SdloraError: the base is missing, incomplete, damaged or not supported, or ``batch_size`` is no number from 1.
    """
    checkpoint, folders = find_base(base_argument(base)), PromptFolders.of(lora_dir, wildcards)
    return OpenStudio(checkpoint, precision=precision, vae_tiling=vae_tiling, batch_size=batch_size, folders=folders)


class OpenStudio:
    """Generates on one base under any LoRAs, without loading the base again; ``open`` makes it.

    Usable in a ``with`` statement, which closes it.
    """

    def __init__(
        self,
        checkpoint: BaseCheckpoint,
        *,
        precision: str,
        vae_tiling: bool,
        batch_size: int | None = None,
        folders: PromptFolders | None = None,
    ):
        if batch_size is not None:
            check_counts(batch_size=batch_size)
        self._checkpoint, self._folders = checkpoint, folders or PromptFolders()
        self._precision, self._vae_tiling, self._batch_size = precision, vae_tiling, batch_size
        self._base: Base | None = None
        self._stack: Stack | None = None
        self._known: tuple[FittedLora, ...] = ()
        """The LoRAs of the last call, which are not read again while their files are the same."""
        self._closed = False

    def __enter__(self) -> OpenStudio:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the base's memory back; closing twice is allowed."""
        self._base, self._stack, self._known, self._closed = None, None, (), True

    def generate(
        self,
        prompts: PromptArgument | Sequence[PromptArgument],
        *,
        loras: LoraArgument | Sequence[LoraArgument] = (),
        negative: str = ImageRequest.negative,
        seed: int | None = None,
        count: int = 1,
        steps: int = ImageRequest.steps,
        cfg: float = ImageRequest.cfg,
        size: int | tuple[int, int] | None = ImageRequest.size,
        sampler: str = ImageRequest.sampler,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        on_image: Callable[[GeneratedImage], None] | None = None,
        say: Callable[[str], None] = lambda line: None,
        **drawing: Unpack[DrawingOptions],
    ) -> list[GeneratedImage]:
        """As the function ``generate``, on this base.

        Raises:
            SdloraError: as ``generate``, or the studio is closed.
            Interrupted: ``stop`` was set.
        """
        requests = image_requests(
            prompts, seed=seed, count=count, size=size, negative=negative, steps=steps, cfg=cfg, sampler=sampler,
            **drawing,
        )  # fmt: skip
        tagged = self._folders.read(requests)
        requests = [entry.request for entry in tagged]
        check_syntax((request.prompt for request in requests), (request.negative for request in requests))
        common = lora_choices(loras)
        for entry in tagged:
            check_named_once([*common, *entry.loras])
        choices = list(dict.fromkeys([*common, *(choice for entry in tagged for choice in entry.loras)]))
        studio = self.prepared(requests, choices, say)
        by_choice = dict(zip(choices, studio.loras, strict=True))
        drawn = [[by_choice[choice] for choice in (*common, *entry.loras)] for entry in tagged]
        cells = list(zip(requests, drawn, strict=True))
        for line in without_effect(cells):
            say(line)
        return images_in_turn(studio, cells, progress=progress, stop=stop, on_image=on_image)

    def generate_strip(
        self,
        prompts: str | Sequence[str],
        *,
        loras: LoraArgument | Sequence[LoraArgument],
        strengths: Sequence[float] = STRENGTHS,
        scale: int = 1,
        negative: str = ImageRequest.negative,
        seed: int | None = None,
        steps: int = ImageRequest.steps,
        cfg: float = ImageRequest.cfg,
        size: int | tuple[int, int] | None = ImageRequest.size,
        sampler: str = ImageRequest.sampler,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        say: Callable[[str], None] = lambda line: None,
        **sampling: Unpack[SamplingOptions],
    ) -> tuple[Image.Image, str]:
        """As the function ``generate_strip``, on this base. Raises as ``generate``."""
        requests = image_requests(
            prompts, seed=seed, count=1, size=size, negative=negative, steps=steps, cfg=cfg, sampler=sampler,
            **sampling,
        )  # fmt: skip
        choices = lora_choices(loras)
        check_columns(choices, strengths, scale)
        requests = choose_texts(requests)
        check_syntax((request.prompt for request in requests), (request.negative for request in requests))
        studio = self.prepared(requests, choices, say)
        columns = strip_columns(studio.loras, strengths)
        cells = [(request, shown) for _, shown in columns for request in requests]
        images = images_in_turn(studio, cells, progress=progress, stop=stop)
        rows = [images[row :: len(requests)] for row in range(len(requests))]
        labels = [label for label, _ in columns]
        sheet = labelled_grid([[image.image for image in row] for row in rows], columns=labels, scale=scale)
        return sheet, "\n\n".join(image.parameters for row in rows for image in row)

    def prepared(
        self,
        requests: Sequence[ImageRequest],
        loras: LoraArgument | Sequence[LoraArgument],
        say: Callable[[str], None] = lambda line: None,
    ) -> Studio:
        """The loaded base with ``loras``; before it is loaded, they and ``requests`` are checked, and ``say`` is called.

        Raises:
            SdloraError: a request or a LoRA that does not fit the base, or the studio is closed.
        """
        if self._closed:
            raise SdloraError("the studio is closed; open another with sdlora.open")
        check_requests(requests, self._checkpoint)
        fitted = fit_loras(self._checkpoint, lora_choices(loras), known=self._known)
        self._known = tuple(lora.fitted for lora in fitted)
        if self._base is None:
            if unused := why_not_cuda():
                logger.warning("%s", unused)
            device = choose_device()
            facts, parameters = device_facts(device), self._checkpoint.unet_parameters
            chosen = explain_precision(self._precision, facts, unet_parameters=parameters, generating=True)
            say(describe_precision(facts, chosen))
            # Imported late since it brings diffusers: faults of the input are reported before.
            from ..base.load import load_base

            self._base = load_base(self._checkpoint, device=device, dtype=chosen.dtype)
        if self._stack is None:
            self._stack = Stack(self._base.modules())
        return Studio(
            base=self._base,
            loras=fitted,
            vae_tiling=self._vae_tiling,
            batch_size=self._batch_size,
            stack=self._stack,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Studio:
    """A loaded base with LoRAs that fit it."""

    base: Base
    loras: tuple[WeightedLora, ...]
    vae_tiling: bool = False
    batch_size: int | None = None
    """The most images that are drawn together; None leaves it to their size."""
    stack: Stack | None = None
    """Where the LoRAs stay after a call; without one they are on the base during a call alone."""

    @classmethod
    def on(cls, base: Base, loras: LoraArgument | Sequence[LoraArgument]) -> Studio:
        """Read ``loras`` for a base that is loaded already; raises ``SdloraError`` where they do not fit."""
        return cls(base=base, loras=fit_loras(base.checkpoint, lora_choices(loras)))

    @classmethod
    def open(
        cls,
        base: str | Path | BaseSection,
        loras: LoraArgument | Sequence[LoraArgument],
        *,
        requests: Sequence[ImageRequest],
        precision: str,
    ) -> Studio:
        """Check ``requests``, read ``loras``, and load ``base``.

        Raises:
            SdloraError: a request or a LoRA that does not fit the base; nothing has been loaded then.
        """
        return open(base, precision=precision).prepared(requests, loras)

    def images(
        self,
        requests: Sequence[ImageRequest],
        *,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        on_image: Callable[[GeneratedImage], None] | None = None,
    ) -> list[GeneratedImage]:
        """Generate ``requests`` under all LoRAs. Raises as ``generate`` does."""
        check_requests(requests, self.base.checkpoint)
        from .images import generate_images

        with progress_or_bar(progress) as reports:
            return generate_images(
                self.base, requests, self.loras, reports, stop, on_image, vae_tiling=self.vae_tiling,
                batch_size=self.batch_size, stack=self.stack,
            )  # fmt: skip


def images_in_turn(
    studio: Studio,
    cells: Sequence[tuple[ImageRequest, Sequence[WeightedLora]]],
    *,
    progress: Progress | None,
    stop: threading.Event | None,
    on_image: Callable[[GeneratedImage], None] | None = None,
) -> list[GeneratedImage]:
    """Generate each request under its own LoRAs, which change where those of a cell and of the one before differ."""
    images: list[GeneratedImage] = []
    with progress_or_bar(progress) as reports:
        for shown, group in groupby(cells, key=lambda cell: list(cell[1])):
            of_loras = replace(studio, loras=tuple(shown))
            some = [request for request, _ in group]
            images += of_loras.images(some, progress=reports, stop=stop, on_image=on_image)
    return images
