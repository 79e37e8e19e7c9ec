"""``sdlora diff``: how two LoRA files differ."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import BaseNameOption, JsonOption, app, emit, examples, guard, shown_cosine


@app.command(epilog=examples("sdlora diff ink-000200.safetensors ink.safetensors"))
@guard
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A LoRA file.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    base: BaseNameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two LoRA files by what they change, whatever their formats, ranks and alphas."""
    from ..tools.diff import diff as compare

    report = compare(first, second, base=base)
    if as_json:
        emit(report.to_json())
        return
    if report.same_tensors:
        typer.echo("all tensors are the same")
    for part in report.parts:
        typer.echo(
            f"{part.part}: {part.modules} modules in both; norms {part.norms[0]:.4g} and {part.norms[1]:.4g}; "
            f"difference {part.difference:.2%} of the larger; cosine {shown_cosine(part.cosine, '.4f')}"
        )
    for file, names in zip(report.files, report.only, strict=True):
        if names:
            typer.echo(f"only in {file}: {len(names)} modules, such as {names[0]}")
    if report.sizes:
        typer.echo(f"another kind, rank or alpha: {len(report.sizes)} modules, such as {report.sizes[0]}")
    if report.metadata:
        typer.echo(f"metadata that differ: {', '.join(report.metadata)}")
