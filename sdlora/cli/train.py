"""``sdlora train``: a LoRA from a folder of captioned images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, emit, examples, guard
from .settings_options import run_config

if TYPE_CHECKING:
    from ..config.sections import Config
    from ..training.loop import TrainReport, TrainResult


DATA, LORA, TRAINING, OUTPUT = "Data", "LoRA", "Training", "Output"
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Start over, whatever an earlier run left.", rich_help_panel=TRAINING)
]
ExtendOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="N steps more for a finished or half-done run.", rich_help_panel=TRAINING),
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
        "sdlora train run.toml --extend 500",
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
    extend: ExtendOption = None,
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
    report = _trained(config, restart=restart, extend=extend, allow_device_change=allow_device_change)
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if as_json:
        keys = ("output", "steps", "seconds", "loss", "validation_loss", "resumed_from", "warning", "texts_written")
        emit({**{key: getattr(report.result, key) for key in keys}, "samples": report.samples})
        return
    typer.echo(f"{report.result.output}: {_summary(report.result)}")
    if report.samples:
        typer.echo(f"{report.samples}: samples")


def _trained(config: Config, *, restart: bool, extend: int | None, allow_device_change: bool) -> TrainReport:
    from ..progress import progress_bar
    from ..training.run import train as train_lora

    with progress_bar() as progress:
        return train_lora(
            config,
            restart=restart,
            extend=extend,
            allow_device_change=allow_device_change,
            progress=progress,
            say=progress.say,
        )


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
    if result.resumed_from:
        parts.append(f"resumed from step {result.resumed_from}")
    return ", ".join(parts)
