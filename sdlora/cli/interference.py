"""``sdlora interference``: how far LoRAs are in each other's way."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import BaseNameOption, JsonOption, app, emit, examples, guard, shown_cosine


@app.command(epilog=examples("sdlora interference ink.safetensors:0.8 blueprint.safetensors:0.8"))
@guard
def interference(
    loras: Annotated[
        list[str], typer.Argument(metavar="FILE[:UNET[:TE]]...", help="Two or more LoRA files with their weights.")
    ],
    base: BaseNameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how much several LoRAs overlap in each block, and suggest weights."""
    from ..tools.interference import interference as measure

    report = measure(loras, base=base)
    if as_json:
        emit(report.to_json())
        return
    typer.echo("cosine of the changes; share of the subspace in common, outputs and inputs")
    for pair in report.pairs:
        shares = f"{pair.outputs:6.1%} {pair.inputs:6.1%}"
        typer.echo(
            f"  {pair.block:24} {pair.files[0]} and {pair.files[1]}: {shown_cosine(pair.cosine, '+.3f')}  {shares}"
        )
    typer.echo("norm of the sum over that of changes at right angles")
    for block, growth in report.growth.items():
        typer.echo(f"  {block:24} {growth:.3f}")
    suggested = (f"{file}:{unet:.3g}:{encoder:.3g}" for file, (unet, encoder) in report.weights.items())
    typer.echo(f"suggested: {' '.join(suggested)}")
