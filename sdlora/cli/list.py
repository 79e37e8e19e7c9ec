"""``sdlora list``: the LoRAs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, app, emit, examples, guard


@app.command(
    "list",
    epilog=examples(
        "sdlora list loras",
        "sdlora list loras --search 'watercolour sdxl' --base my-checkpoint.safetensors",
        "sdlora list loras --duplicates --json",
    ),
)
@guard
def list_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of LoRA files; folders in it are included.")],
    search: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="List what has all words in its name, title, trigger, tags or base."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="Say of each LoRA whether it fits this base.")
    ] = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Find files with equal tensors; reads those that may be equal.")
    ] = False,
    with_hashes: Annotated[
        bool, typer.Option("--hash", help="Compute AutoV2 and AutoV3 of what is listed; reads the files, once.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the LoRAs in a folder: family, rank, size, trigger, hash, preview; from the headers of the files."""
    from ..library.listing import list_loras
    from ..library.text import as_text

    library = list_loras(folder, search=search, base=base, duplicates=duplicates, hashes=with_hashes)
    if as_json:
        emit(library.to_json())
    else:
        typer.echo(as_text(library, fits=base is not None))
