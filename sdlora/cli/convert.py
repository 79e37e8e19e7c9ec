"""``sdlora convert``: a LoRA in another format."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import JsonOption, app, emit, examples, guard


@app.command(
    epilog=examples(
        "sdlora convert zorb.safetensors zorb-peft.safetensors --to peft",
    )
)
@guard
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A LoRA file in any format, or the folder of a PEFT adapter.")
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="kohya, diffusers or peft.")],
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="The base it was trained on, if it is not of a published size.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Precision of the tensors: auto (unchanged), float16, bfloat16 or float32.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Convert a LoRA to another format: the same changes under other names."""
    if precision not in ("auto", "float16", "bfloat16", "float32"):
        raise typer.BadParameter(f"{precision!r} is not a precision", param_hint="--precision")
    from ..tools.convert import convert as convert_file

    report = convert_file(source, target, to=to, base=base, precision=precision)
    if as_json:
        emit(report.to_json())
    else:
        typer.echo(f"{report.output}: {report.modules} modules, {report.family}, {report.format} names, {report.dtype}")
        typer.echo(f"  {report.read_by}")
        for problem in report.left_out:
            typer.echo(f"  left out: {problem}")
