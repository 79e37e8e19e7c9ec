"""The options of ``sdlora generate`` that concern prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..generation.prompt_file import PromptLine

PromptArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Several prompts make several images.")
]
PromptsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A prompt a line, with options of its own as in A1111 or kohya's trainer."),
]
WildcardsOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder of text files: __animal__ is a line of animal.txt, by the seed."),
]


def prompt_lines(prompts: list[str], file: str | None) -> list[PromptLine]:
    """The prompts of the command, then those of ``file``.

    Raises:
        typer.BadParameter: there are none.
        SdloraError: the file cannot be read, or has faults.
    """
    from ..generation.prompt_file import PromptLine, read_prompts

    if not prompts and file is None:
        raise typer.BadParameter("there is no prompt; write one, or name a file with --prompts", param_hint="PROMPT")
    return [*(PromptLine(prompt=prompt) for prompt in prompts), *([] if file is None else read_prompts(file))]
