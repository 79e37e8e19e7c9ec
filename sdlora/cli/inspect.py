"""``sdlora inspect``: what a LoRA or a checkpoint is."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import JsonOption, app, emit, examples, guard


@app.command(
    epilog=examples(
        "sdlora inspect zorb.safetensors",
        "sdlora inspect my-checkpoint.safetensors --hash",
    )
)
@guard
def inspect(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A LoRA, a checkpoint file or folder, 'mini', or an image.")
    ],
    with_hashes: Annotated[
        bool,
        typer.Option(
            "--hash", help="Also compute the SHA-256, AutoV1, AutoV2 and AutoV3 of a checkpoint; reads the whole file."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a LoRA file or a checkpoint is: family, modules, ranks, hashes, metadata, problems; or an image's recipe."""
    from ..tools.inspect import inspect as inspect_file
    from ..tools.inspect_report import as_text

    report = inspect_file(file, hashes=with_hashes)
    if as_json:
        emit(report.to_json())
    else:
        typer.echo(as_text(report))
