"""Training and inspecting as functions: what ``sdlora train`` and ``inspect`` call, and what programs call."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Config
from .data.captions import with_trigger
from .data.findings import raise_errors
from .formats.thumbnail import add_thumbnail
from .generation.grid import labelled_grid
from .generation.infotext import save_png
from .inspection.files import inspect_file
from .inspection.report import Report
from .linting import lint_config, summary_lines
from .progress import progress_bar

if TYPE_CHECKING:
    from .training.loop import TrainResult


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
        # Imported here since it brings diffusers: what is wrong with the input is told before.
        from accelerate import PartialState

        from .training.loop import run_training
        from .training.plan import plan_run

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
    from .studio import generate

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


def inspect(path: str | Path, *, hashes: bool = False, show_progress: bool = True) -> Report:
    """What a LoRA file or a checkpoint is; ``hashes`` of a checkpoint are only told when asked for, as they read all of it.

    Raises:
        SdloraError: it is neither, or it is damaged.
    """
    with progress_bar(show_progress) as progress:
        return inspect_file(str(path), hashes=hashes, progress=progress)
