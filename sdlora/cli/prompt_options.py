"""The options of ``sdlora generate`` that concern prompts."""

from __future__ import annotations

from typing import Annotated

import typer

WildcardsOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder of text files: __animal__ is a line of animal.txt, by the seed."),
]
