"""``sdlora bake``: LoRAs in a checkpoint's weights."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import JsonOption, app, emit, examples, guard


@app.command(epilog=examples("sdlora bake base.safetensors ink.safetensors:0.8 --out base-ink.safetensors"))
@guard
def bake(
    base: Annotated[str, typer.Argument(metavar="BASE", help="'mini', a checkpoint file, or a diffusers folder.")],
    loras: Annotated[list[str], typer.Argument(metavar="FILE[:UNET[:TE]]...", help="LoRA files with their weights.")],
    out: Annotated[str, typer.Option(metavar="OUT", help="The checkpoint to write, a file or a folder as BASE is.")],
    as_json: JsonOption = False,
) -> None:
    """Bake LoRAs into a copy of a checkpoint: it draws as the base with these LoRAs does."""
    from ..tools.bake import bake as bake_checkpoint

    report = bake_checkpoint(base, loras, out)
    if as_json:
        emit(report.to_json())
        return
    typer.echo(f"{report.output}: {report.modules} modules changed, {report.family}")
    for line in report.left_out:
        typer.echo(f"  left out: {line}")
