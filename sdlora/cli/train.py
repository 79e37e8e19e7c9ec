"""``sdlora train``: a LoRA from a folder of captioned images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, emit, examples, guard
from .settings_options import run_config

if TYPE_CHECKING:
    from ..training.report import TrainResult


DATA, LORA, TRAINING, OUTPUT = "Data", "LoRA", "Training", "Output"
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Start over, whatever an earlier run left.", rich_help_panel=TRAINING)
]
OutOption = Annotated[str | None, typer.Option(metavar="FILE", help="The LoRA file to write.", rich_help_panel=OUTPUT)]
DeviceChangeOption = Annotated[
    bool,
    typer.Option(
        "--allow-device-change",
        help="Resume on another type of device or in another precision too.",
        rich_help_panel=TRAINING,
    ),
]


@app.command(
    epilog=examples(
        "sdlora train --images my-images --trigger zorb --out out/zorb.safetensors",
        "sdlora train --images my-images --trigger zorb --base my-checkpoint.safetensors --steps 1500 --rank 32",
        "sdlora train run.toml train.seed=1",
        more="All settings, for a TOML file or as section.key=value: sdlora settings",
    )
)
@guard
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.toml] [section.key=value]...", show_default=False)
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of images with .txt captions.", rich_help_panel=DATA)
    ] = None,
    trigger: Annotated[str | None, typer.Option(metavar="WORD", help="Trigger word.", rich_help_panel=DATA)] = None,
    resolution: Annotated[
        int | None,
        typer.Option(help="Side of a square image in pixels; default: the base's own.", rich_help_panel=DATA),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of each module; lora.rank.", rich_help_panel=LORA)] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="'mini', a checkpoint file, or a diffusers folder.", rich_help_panel=TRAINING
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in all; train.steps.", rich_help_panel=TRAINING)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Length in epochs, instead of --steps; train.epochs.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in one step; train.batch_size.", rich_help_panel=TRAINING)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak for the UNet; optimizer.learning_rate.", rich_help_panel=TRAINING)
    ] = None,
    restart: RestartOption = False,
    allow_device_change: DeviceChangeOption = False,
    out: OutOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Train a LoRA from a folder of captioned images. Run the same command to resume."""
    options: dict[tuple[str, str], object] = {
        ("--images", "data.images"): images,
        ("--trigger", "data.trigger"): trigger,
        ("--resolution", "data.resolution"): resolution,
        ("--rank", "lora.rank"): rank,
        ("--base", "base.path"): base,
        ("--steps", "train.steps"): steps,
        ("--epochs", "train.epochs"): epochs,
        ("--batch-size", "train.batch_size"): batch_size,
        ("--learning-rate", "optimizer.learning_rate"): learning_rate,
        ("--out", "output.path"): out,
    }
    config = run_config(arguments or (), options)
    from ..progress import progress_bar
    from ..training.run import train as train_lora

    with progress_bar() as progress:
        report = train_lora(
            config, restart=restart, allow_device_change=allow_device_change, progress=progress, say=progress.say
        )
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if as_json:
        emit({**{key: getattr(report.result, key) for key in ANSWER}, "samples": report.samples})
        return
    typer.echo(f"{report.result.output}: {_summary(report.result)}")
    if report.samples:
        typer.echo(f"{report.samples}: samples")


ANSWER = (
    "output", "steps", "file_step", "seconds", "loss", "validation_loss", "resumed_from", "warning", "texts_written",
)  # fmt: skip
"""Fields of the result that ``--json`` prints."""


def _summary(result: TrainResult) -> str:
    if result.loss is None and not result.resumed_from:
        if result.texts_written:
            return "this run is complete already; the changed texts of [output] are written into the file"
        return "this run is complete already; --restart starts over"
    parts = [
        f"{result.output.stat().st_size / 1e6:.1f} MB",
        f"{result.steps} steps",
        f"{result.seconds:.0f} s",
    ]
    if result.loss is not None:
        parts.insert(2, f"loss {result.loss:.4f} (mean of the last 10 %)")
    if result.validation_loss is not None:
        parts.append(f"validation loss {result.validation_loss:.4f}")
    if result.file_step < result.steps:
        parts.append(f"with the weights of step {result.file_step}, which had the lowest validation loss")
    if result.resumed_from:
        parts.append(f"resumed from step {result.resumed_from}")
    return ", ".join(parts)
