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
PreviewOption = Annotated[
    str | None,
    typer.Option(metavar="WHERE", help="Show images under way: 'terminal', or a .png file that is rewritten."),
]


def prompt_lines(prompts: list[str], file: str | None, *, required: bool) -> list[PromptLine]:
    """The prompts of the command, then those of ``file``.

    Raises:
        typer.BadParameter: there are none, where one is ``required``.
        SdloraError: the file cannot be read, or has faults.
    """
    from ..generation.prompt_file import PromptLine, read_prompts

    if required and not prompts and file is None:
        remedy = "write one, or name a file with --prompts, or an image with --from"
        raise typer.BadParameter(f"there is no prompt; {remedy}", param_hint="PROMPT")
    return [*(PromptLine(prompt=prompt) for prompt in prompts), *([] if file is None else read_prompts(file))]
