"""``sdlora settings``: the reference of all settings."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import JsonOption, app, emit, examples, guard


@app.command(
    epilog=examples(
        "sdlora settings",
        "sdlora settings lora",
        "sdlora settings lora.rank",
    )
)
@guard
def settings(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="For example lora, or lora.rank; default: all.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the settings of a run: values, default, documentation, what each affects, kohya's name."""
    from ..config.reference import reference_text, select_sections

    sections = select_sections(section)
    if as_json:
        emit({"settings": [setting.to_json() for each in sections for setting in each.settings]})
    else:
        typer.echo(reference_text(sections))
