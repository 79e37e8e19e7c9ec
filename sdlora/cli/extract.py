"""``sdlora extract``: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import JsonOption, app, emit, examples, guard


@app.command(epilog=examples("sdlora extract base.safetensors tuned.safetensors tuned-lora.safetensors --rank 32"))
@guard
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="'mini', a checkpoint file, or a diffusers folder.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="A checkpoint that was trained from it.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    rank: Annotated[int | None, typer.Option(help="Highest rank of a module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each module's squared norm to keep, such as 0.99.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Precision of the tensors: float16, bfloat16 or float32.")] = "float16",
    as_json: JsonOption = False,
) -> None:
    """Extract a LoRA from two checkpoints: what was trained into one of them."""
    if precision not in ("float16", "bfloat16", "float32"):
        raise typer.BadParameter(f"{precision!r} is not a precision", param_hint="--precision")
    from ..tools.extract import extract as extract_file

    report = extract_file(base, tuned, target, rank=rank, energy=energy, precision=precision)
    if as_json:
        emit(report.to_json())
        return
    low, high = report.rank
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    typer.echo(
        f"{report.output}: {report.modules} modules, {report.family}, {ranks}; {report.same} modules are the same"
    )
    typer.echo(f"  squared norm kept: {report.energy:.2%}")
    if report.left_out:
        count = len(report.left_out)
        typer.echo(f"  left out: {count} tensors that are no layers' weights and differ, such as {report.left_out[0]}")
