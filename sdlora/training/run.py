"""The public function ``train``: data examined, base loaded, LoRA trained, samples generated."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.sections import Config
from ..data.captions import with_trigger
from ..data.findings import raise_errors
from ..formats.thumbnail import add_thumbnail
from ..generation.grid import labelled_grid
from ..generation.infotext import save_png
from ..lint.report import LintReport, summary_lines
from ..lint.run import examine_dataset
from ..progress import progress_bar

if TYPE_CHECKING:
    from .loop import TrainResult


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
        say: is told what is worth knowing of the images and captions, a line at a time, before a model is loaded.

    Raises:
        SdloraError: a fault of the input, found before a model is loaded wherever that is possible.
        Interrupted: Ctrl-C; the state is saved and the same call goes on from it.
    """
    from accelerate import PartialState

    main = PartialState().is_main_process
    with progress_bar(show_progress and main) as progress:
        dataset = examine_dataset(config, progress=progress)
        raise_errors(dataset.findings)
        # Imported here since it brings diffusers: what is wrong with the input is reported before.
        from .loop import run_training
        from .plan import plan_run

        plan = plan_run(config, dataset)
        if main:
            for line in summary_lines(LintReport(dataset=dataset)):
                say(line)
            for finding in plan.findings[len(dataset.findings) :]:
                say(str(finding))
        result = run_training(plan, restart=restart, progress=progress)
    prompts = config.samples.prompts
    if prompts is None:
        sources = [item.source for item in plan.items if item.source.role == "train"]
        prompts = tuple(dict.fromkeys(source.rules.plain(source.captions) for source in sources))[:4]
    if not prompts or result.loss is None or not main:
        return TrainReport(result=result, samples=None)
    from ..generation.studio import generate

    gc.collect()  # Models hold themselves in cycles: without this the run's base would lie beside the samples' base.
    images = generate(
        [with_trigger(prompt, config.trigger) for prompt in prompts],
        base=config.base,
        loras=[str(result.output)],
        seed=config.train.seed,
        show_progress=show_progress,
    )
    sheet = labelled_grid([[image.image for image in images]], columns=[""] * len(images))
    samples = result.output.with_suffix(".samples.png")
    save_png(sheet, samples, "\n\n".join(image.parameters for image in images))
    if config.output.thumbnail and config.output.metadata == "full":
        add_thumbnail(result.output, images[0].image)
    return TrainReport(result=result, samples=samples)
