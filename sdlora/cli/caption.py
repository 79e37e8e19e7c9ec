"""``sdlora caption``: missing captions, written by a local model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import DataError
from .app import JsonOption, app, emit, examples, guard


@app.command(
    epilog=examples(
        "sdlora caption my-images --model my-captioner --trigger zorb",
    )
)
@guard
def caption(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images; subfolders are included.")],
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of a BLIP, Florence-2 or WD14 tagger model.")],
    kind: Annotated[str, typer.Option(help="auto, blip, florence or wd14.")] = "auto",
    trigger: Annotated[str, typer.Option(metavar="WORD", help="Put before every caption that is written.")] = "",
    caption_extension: Annotated[str, typer.Option(metavar=".EXT", help="Extension of the caption files.")] = ".txt",
    as_json: JsonOption = False,
) -> None:
    """Write the missing captions beside the images with a local model; existing captions stay untouched."""
    from ..captioning.models import KINDS, find_kind

    if kind not in ("auto", *KINDS):
        raise typer.BadParameter(f"{kind!r} is not auto, {', '.join(KINDS)}", param_hint="--kind")
    found = find_kind(model, kind)
    from ..captioning.folder import caption_folder

    report = caption_folder(folder, model=model, kind=found, trigger=trigger.strip(), extension=caption_extension)
    if as_json:
        emit({"kind": found, **report.to_json()})
    else:
        typer.echo(f"{folder}: {len(report.written)} captions written, {report.present} existed before")
    if report.problems:
        raise DataError(report.problems)
