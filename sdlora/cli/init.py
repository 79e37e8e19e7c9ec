"""``sdlora init``: a commented configuration for a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, app, emit, examples, guard
from .settings_options import FIRST_PRESET


@app.command(
    "init",
    epilog=examples(
        "sdlora init my-images",
        "sdlora init my-images --trigger zorb --base my-checkpoint.safetensors --preset character --out zorb.toml",
        more="Then: sdlora train NAME.toml",
    ),
)
@guard
def init_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images with captions.")],
    out: Annotated[
        Path | None, typer.Option(metavar="NAME.toml", help="The file to write; default: named like the folder.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="'mini' (the default), a checkpoint file, or a diffusers folder.")
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(metavar="WORD", help="Trigger word; default: a rare word of the captions.")
    ] = None,
    preset: Annotated[str, typer.Option(metavar="NAME", help="style, character, concept or none.")] = FIRST_PRESET,
    as_json: JsonOption = False,
) -> None:
    """Look at a folder of images and write a commented configuration for it, which sdlora train takes as it is."""
    from ..config.presets import MINI
    from ..files import check_target, write_new
    from ..lint.report import summary_lines
    from ..progress import progress_bar
    from ..training.first_config import check_new_config, first_config
    from ..training.first_config_text import answer, config_text, described

    file = out or Path(f"{folder.resolve().name or 'dataset'}.toml")
    check_target(file)
    check_new_config(file)
    with progress_bar() as progress:
        first = first_config(folder, file=file, base=base or MINI, preset=preset, trigger=trigger, progress=progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not write_new(file, config_text(first, file).encode()):
        check_new_config(file)
    if as_json:
        emit(dict(answer(first, file)))
        return
    for line in (*summary_lines(first.report), *described(first.report), first.plan.length_in_words):
        typer.echo(line)
    typer.echo(f"trigger {first.loaded.config.trigger}: {first.loaded.stated['data.trigger']}")
    typer.echo(f"{file}: written; next: sdlora train {file}")
