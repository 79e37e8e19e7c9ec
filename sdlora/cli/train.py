"""``sdlora train``: a LoRA from a folder of captioned images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, app, emit, guard


@app.command()
@guard
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.toml] [section.key=value]...", show_default=False)
    ] = None,
    images: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of images with .txt captions.")] = None,
    trigger: Annotated[str | None, typer.Option(metavar="WORD", help="The word that calls the style.")] = None,
    base: Annotated[str | None, typer.Option(metavar="BASE", help="'mini', a file or a folder.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="The LoRA file to write.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever an earlier run left.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA from a folder of captioned images; the same command again resumes it."""
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
    from ..training.run import train as train_lora

    report = train_lora(config, restart=restart, say=lambda line: typer.echo(line, err=True))
    result = report.result
    if as_json:
        keys = ("output", "steps", "seconds", "loss", "validation_loss", "resumed_from")
        emit({**{key: getattr(result, key) for key in keys}, "samples": report.samples})
    elif result.loss is None:
        typer.echo(f"{result.output}: this run is complete already; --restart would begin anew")
    else:
        done = f"{result.steps} steps, the last tenth at loss {result.loss:.4f}, {result.seconds:.0f} s"
        if result.validation_loss is not None:
            done += f", validation loss {result.validation_loss:.4f}"
        since = f", resumed from step {result.resumed_from}" if result.resumed_from else ""
        size = result.output.stat().st_size / 1e6
        typer.echo(f"{result.output}: {size:.1f} MB, {done}{since}")
        if report.samples:
            typer.echo(f"{report.samples}: samples")
