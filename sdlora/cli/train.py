"""``sdlora train``: a LoRA from a folder of captioned images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import JsonOption, app, emit, guard

if TYPE_CHECKING:
    from ..training.loop import TrainResult


@app.command()
@guard
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.toml] [section.key=value]...", show_default=False)
    ] = None,
    images: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of images with .txt captions.")] = None,
    trigger: Annotated[str | None, typer.Option(metavar="WORD", help="Trigger word.")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="'mini', a checkpoint file, or a diffusers folder."),
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="The LoRA file to write.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over, whatever an earlier run left.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA from a folder of captioned images. Run the same command to resume."""
    from ..config.loading import load_config

    given = list(arguments or ())
    file = given.pop(0) if given and "=" not in given[0] else None
    options = {"data.images": images, "data.trigger": trigger, "base.path": base, "output.path": out}
    if file is None and images is not None and out is None:
        options["output.path"] = f"out/{Path(images).resolve().name}.safetensors"
    # As TOML text, whatever it looks like: a trigger word of digits stays a word.
    given += [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    if file is None and not given:
        raise typer.BadParameter("name a CONFIG.toml, or give --images DIR and --trigger WORD")
    config = load_config(file, given)
    from ..progress import progress_bar
    from ..training.run import train as train_lora

    with progress_bar() as progress:
        report = train_lora(config, restart=restart, progress=progress, say=progress.say)
    if as_json:
        keys = ("output", "steps", "seconds", "loss", "validation_loss", "resumed_from")
        emit({**{key: getattr(report.result, key) for key in keys}, "samples": report.samples})
        return
    typer.echo(f"{report.result.output}: {_summary(report.result)}")
    if report.samples:
        typer.echo(f"{report.samples}: samples")


def _summary(result: TrainResult) -> str:
    if result.loss is None and not result.resumed_from:
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
