"""``sdlora resize``: a LoRA at a lower rank."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import BaseNameOption, JsonOption, PrecisionOption, app, emit, examples, guard


@app.command(
    epilog=examples(
        "sdlora resize ink.safetensors ink-8.safetensors --rank 8",
        "sdlora resize ink.safetensors ink-small.safetensors --energy 0.95",
    )
)
@guard
def resize(
    source: Annotated[str, typer.Argument(metavar="IN", help="A LoRA file.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    rank: Annotated[int | None, typer.Option(help="Highest rank of a module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each module's squared norm to keep, such as 0.99.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Keep singular values down to the largest divided by this; kohya's sv_ratio.")
    ] = None,
    base: BaseNameOption = None,
    precision: PrecisionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a LoRA at a lower rank: the closest change that the rank allows, module by module."""
    from ..tools.resize import resize as resize_file

    report = resize_file(source, target, rank=rank, energy=energy, ratio=ratio, base=base, precision=precision)
    if as_json:
        emit(report.to_json())
        return
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in report.ranks.items())
    typer.echo(f"{report.output}: {report.bytes_after / 1e6:.2f} MB, before {report.bytes_before / 1e6:.2f} MB")
    typer.echo(f"  modules: {ranks}")
    typer.echo(f"  squared norm kept: {report.mean_energy:.2%} on average, {report.energy:.2%} at least")
    for line in report.left_out:
        typer.echo(f"  left out: {line}")
