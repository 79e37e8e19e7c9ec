"""The verbs as functions: what ``sdlora train``, ``generate`` and ``inspect`` call, and what programs call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from .base.checkpoint import find_base
from .base.load import Base, choose_device, load_base
from .config import BaseSection, Config
from .data.captions import with_trigger
from .data.findings import raise_errors
from .errors import SdloraError
from .formats.thumbnail import add_thumbnail
from .generation.grid import labelled_grid
from .generation.infotext import SAMPLERS, save_png
from .generation.loras import FittedLora, LoraChoice, fit_loras
from .generation.pipeline import Picture, PictureRequest, generate_pictures
from .inspection.files import inspect_file
from .inspection.report import Report
from .linting import lint_config, summary_lines
from .precision import choose_precision
from .progress import progress_bar
from .training.loop import TrainResult, run_training
from .training.plan import plan_run


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What ``train`` made: the run's result, and the sample sheet where one was asked for."""

    result: TrainResult
    samples: Path | None


def train(
    config: Config,
    *,
    restart: bool = False,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> TrainReport:
    """Train a LoRA, or go on with it, and write the file that ``config.output.path`` names.

    Args:
        say: is told what is worth knowing of the pictures and captions, a line at a time, before a model is loaded.

    Raises:
        SdloraError: a fault of the input, found before a model is loaded wherever that is possible.
        Interrupted: Ctrl-C; the state is saved and the same call goes on from it.
    """
    with progress_bar(show_progress) as progress:
        report = lint_config(config, progress=progress)
        raise_errors(report.findings)
        plan = plan_run(config, progress)
        if PartialState().is_main_process:
            for line in (*summary_lines(report), *(str(own) for own in plan.findings if own not in report.findings)):
                say(line)
        result = run_training(plan, restart=restart, progress=progress)
    prompts = config.output.samples
    if prompts is None:
        sources = [item.source for item in plan.items if item.source.role == "train"]
        prompts = tuple(dict.fromkeys(source.rules.plain(source.captions) for source in sources))[:4]
    if not prompts or result.loss is None or not PartialState().is_main_process:
        return TrainReport(result=result, samples=None)
    gc.collect()  # Models hold themselves in cycles: without this the run's base would lie beside the samples' base.
    pictures = generate(
        [with_trigger(prompt, config.data.trigger) for prompt in prompts],
        base=config.base,
        loras=[str(result.output)],
        seed=config.train.seed,
        show_progress=show_progress,
    )
    sheet = labelled_grid([[picture.image for picture in pictures]], columns=[""] * len(pictures))
    samples = result.output.with_suffix(".samples.png")
    save_png(sheet, samples, "\n\n".join(picture.parameters for picture in pictures))
    if config.output.thumbnail and config.output.metadata == "full":
        add_thumbnail(result.output, pictures[0].image)
    return TrainReport(result=result, samples=samples)


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
) -> list[Picture]:
    """Generate ``count`` pictures of each prompt, with seeds ``seed``, ``seed + 1`` …, under all ``loras`` at once.

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
    with progress_bar(show_progress) as progress:
        return generate_pictures(studio.base, requests, studio.pairs, progress)


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
    """A labelled picture: a row for each prompt, a column for each strength of each LoRA, and a last one for all together.

    Strengths multiply the weights of ``loras``; strength 0 is shown once. Returns the picture and its parameters.
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
    pictures = []
    with progress_bar(show_progress) as progress:
        for _, pairs in columns:
            pictures.append(generate_pictures(studio.base, requests, pairs, progress))
    rows = [[column[row].image for column in pictures] for row in range(len(prompts))]
    sheet = labelled_grid(rows, columns=[label for label, _ in columns], scale=scale)
    return sheet, "\n\n".join(column[row].parameters for row in range(len(prompts)) for column in pictures)


def inspect(path: str | Path, *, hashes: bool = False, show_progress: bool = True) -> Report:
    """What a LoRA file or a checkpoint is; ``hashes`` of a checkpoint are only told when asked for, as they read all of it.

    Raises:
        SdloraError: it is neither, or it is damaged.
    """
    with progress_bar(show_progress) as progress:
        return inspect_file(str(path), hashes=hashes, progress=progress)


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
    ) -> PictureRequest:
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
        return PictureRequest(
            prompt=prompt,
            negative=negative,
            seed=seed,
            steps=steps,
            guidance=cfg,
            width=width,
            height=height,
            sampler=sampler,
        )
