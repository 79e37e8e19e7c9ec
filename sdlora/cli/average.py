"""``sdlora average``: the mean of LoRA files that one run wrote."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import BaseNameOption, JsonOption, PrecisionOption, app, emit, examples, guard


@app.command(
    epilog=examples(
        "sdlora average ink-000400.safetensors ink-000500.safetensors ink.safetensors --out ink-mean.safetensors"
    )
)
@guard
def average(
    sources: Annotated[list[str], typer.Argument(metavar="FILE...", help="LoRA files of one run.")],
    out: Annotated[str, typer.Option(metavar="OUT", help="The .safetensors file to write.")],
    base: BaseNameOption = None,
    precision: PrecisionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Average LoRA files of one run, tensor by tensor; for LoRAs of different runs use merge."""
    from ..tools.average import average as average_files

    report = average_files(sources, out, base=base, precision=precision)
    if as_json:
        emit(report.to_json())
    else:
        typer.echo(f"{report.output}: the mean of {report.files} files, {report.modules} modules, {report.dtype}")
