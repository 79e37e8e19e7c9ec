"""``sdlora caption``: the captions that are missing, written by a local model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import DataError
from .app import JsonOption, app, emit, guard


@app.command()
def caption(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images; those within it too.")],
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="BLIP, Florence-2, or a WD14 tagger, on this disk.")],
    kind: Annotated[str, typer.Option(help="auto, blip, florence or wd14.")] = "auto",
    trigger: Annotated[str, typer.Option(metavar="WORD", help="Put in front of every caption written.")] = "",
    caption_extension: Annotated[str, typer.Option(metavar=".EXT", help="Of the caption files.")] = ".txt",
    as_json: JsonOption = False,
) -> None:
    """Write the captions that are missing beside the images, by a local model; no caption is ever changed."""

    def run() -> None:
        from ..captioning.models import KINDS, find_kind

        if kind not in ("auto", *KINDS):
            raise typer.BadParameter(f"{kind!r} is not auto, {', '.join(KINDS)}", param_hint="--kind")
        found = find_kind(model, kind)
        from ..captioning.folder import caption_folder

        report = caption_folder(folder, model=model, kind=found, trigger=trigger.strip(), extension=caption_extension)
        if as_json:
            emit({"kind": found, **report.to_json()})
        else:
            typer.echo(f"{folder}: {len(report.written)} captions written, {report.present} were there before")
        if report.problems:
            raise DataError(report.problems)

    guard(run)
