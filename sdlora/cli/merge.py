"""``sdlora merge``: several LoRAs in one file."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import BaseNameOption, JsonOption, PrecisionOption, app, emit, examples, guard


@app.command(
    epilog=examples(
        "sdlora merge ink.safetensors:0.8 blueprint.safetensors:0.5 --out both.safetensors",
        "sdlora merge a.safetensors b.safetensors --out both.safetensors --method svd --rank 32",
    )
)
@guard
def merge(
    loras: Annotated[list[str], typer.Argument(metavar="FILE[:UNET[:TE]]...", help="LoRA files with their weights.")],
    out: Annotated[str, typer.Option(metavar="OUT", help="The .safetensors file to write.")],
    method: Annotated[
        str, typer.Option(help="concat (exact; ranks add up), svd, linear (weighted mean), ties or dare.")
    ] = "concat",
    rank: Annotated[int | None, typer.Option(help="Highest rank of a module; not for concat.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each module's squared norm to keep, such as 0.99; not for concat.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the numbers that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of what dare drops.")] = 0,
    base: BaseNameOption = None,
    precision: PrecisionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Merge several LoRAs into one file that does what they do together."""
    from ..tools.merge import merge as merge_files

    report = merge_files(
        loras,
        out,
        method=method,  # ty: ignore[invalid-argument-type]
        rank=rank,
        energy=energy,
        density=density,
        seed=seed,
        base=base,
        precision=precision,
    )
    if as_json:
        emit(report.to_json())
        return
    low, high = report.rank
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    typer.echo(f"{report.output}: {report.modules} modules, {report.family}, {ranks}, {report.dtype}, {report.method}")
    if report.energy < 1:
        typer.echo(f"  at least {report.energy:.2%} of each module's squared norm is kept")
    for line in report.left_out:
        typer.echo(f"  left out: {line}")
